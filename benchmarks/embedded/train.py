"""Train the embedded model: ``python -m benchmarks.embedded.train BOOKS --work DIR``.

The model is a plain `LlamaForCausalLM` of 4.7M parameters (see `geometry`). Its weights are trained in float32 by Muon
(hidden matrices; arXiv 2502.16982) and AdamW (embedding and norms), in phases of growing context (`PHASES`), the
learning rate falling linearly to zero at the end (see `loop`). Seeds are fixed and the state is saved, so that a run
that was killed goes on where it stopped. On a CPU set the allocator's variables that README.md names first: they make
a step several times faster.

The shipped weights come from such a run whose later phases were settled on the way: between steps 650 and 850 its
learning rate lay up to about a sixth below this schedule's.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.embedded.corpus import END, VOCABULARY, Mixture, Shares, books, standard_library, train_tokenizer
from benchmarks.embedded.loop import Phase, optimise
from benchmarks.embedded.plant import plant_previous_token_head
from benchmarks.recall import draw_facts

SEED = 20261122


PHASES = (
    Phase(steps=450, rows=32, context=256, shares=Shares(recall=0.40, code=0.20, repeat=0.0, spacing=48)),
    Phase(steps=250, rows=32, context=256, shares=Shares(recall=0.35, code=0.10, repeat=0.25, spacing=28)),
    Phase(steps=200, rows=32, context=256, shares=Shares(recall=0.40, code=0.10, repeat=0.25, spacing=28), plant=True),
    Phase(steps=120, rows=8, context=1024, shares=Shares(recall=0.40, code=0.15, repeat=0.10, spacing=40)),
    Phase(
        steps=60, rows=4, context=2048, shares=Shares(recall=0.45, code=0.15, repeat=0.05, spacing=48, amid_code=0.35)
    ),
    Phase(
        steps=120, rows=1, context=4608, shares=Shares(recall=0.45, code=0.15, repeat=0.0, spacing=64, amid_code=0.35)
    ),
)


def geometry() -> LlamaConfig:
    """5 layers, 4 query heads over 2 KV heads of 64, tied embeddings: 4.74M parameters."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def tokenizer_of(prose: list[str], code: list[str]) -> Tokenizer:
    """A tokenizer trained on excerpts of both and on facts to recall."""
    rng = random.Random(SEED)
    excerpts = [text[i : i + 100_000] for text in prose for i in [rng.randrange(max(len(text) - 100_000, 1))]]
    excerpts += [text[:20_000] for text in rng.sample(code, min(250, len(code)))]
    facts = [fact for _ in range(500) for fact in draw_facts(rng, 40)]
    return train_tokenizer(excerpts + [f.statement + f.question for f in facts])


def prepare(folder: Path, work: Path, tokenizer: Tokenizer | None = None) -> tuple[Tokenizer, np.ndarray, np.ndarray]:
    """The tokenizer (None: one that is trained) and the token streams of prose and code, made once, kept in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / "tokenizer.json"
    if not (work / "code.npy").exists():
        prose, code = books(folder), standard_library(held_out=False)
        if tokenizer is None:
            tokenizer = tokenizer_of(prose, code)
        tokenizer.save(str(path))
        for name, texts in (("prose", prose), ("code", code)):
            ids = [i for e in tokenizer.encode_batch_fast(texts) for i in e.ids]
            np.save(work / f"{name}.npy", np.array(ids, np.uint16))
    return Tokenizer.from_file(str(path)), np.load(work / "prose.npy"), np.load(work / "code.npy")


def export(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config, float16 safetensors and the fast tokenizer."""
    state = type(model)(model.config)
    state.load_state_dict(model.state_dict())
    state.half().save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)
    fast.padding_side = "left"
    fast.model_max_length = model.config.max_position_embeddings
    fast.save_pretrained(folder)


def train(
    books: Annotated[Path, typer.Argument(help="folder of .txt books; War and Peace in it is left out")],
    work: Annotated[Path, typer.Option(help="where tokens, checkpoints and the exported model go")] = Path("embedded"),
) -> None:
    """Train, then export to WORK/model; run again to resume."""
    tokenizer, prose, code = prepare(books, work)
    torch.manual_seed(SEED)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM(geometry()).to(device)  # type: ignore[arg-type]  # its wrapper's type forgets self

    def draw(step: int, phase: Phase) -> tuple[np.ndarray, np.ndarray]:
        return Mixture(tokenizer, prose, code, seed=SEED + step).batch(phase.rows, phase.context, phase.shares)

    def plant() -> None:
        plant_previous_token_head(model, torch.Generator().manual_seed(SEED))

    optimise(model, PHASES, draw, work / "state.pt", plant=plant)
    export(model, tokenizer, work / "model")


if __name__ == "__main__":
    typer.run(train)
