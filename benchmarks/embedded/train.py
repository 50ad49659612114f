"""Train the embedded model: ``python -m benchmarks.embedded.train BOOKS --work DIR``.

The model is a plain `LlamaForCausalLM` of 4.7M parameters (see `geometry`). Its weights are trained in float32 by Muon
(hidden matrices; arXiv 2502.16982) and AdamW (embedding and norms), in phases of growing context (`PHASES`), the
learning rate falling linearly to zero over the last `DECAY` of the steps. Seeds are fixed and the state is saved every
`SAVE_EVERY` steps, so that a run that was killed goes on where it stopped. On a CPU set the allocator's variables that
README.md names first: they make a step several times faster.

The shipped weights come from such a run whose later phases were settled on the way: between steps 650 and 850 its
learning rate lay up to about a sixth below this schedule's.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.embedded.corpus import END, VOCABULARY, Mixture, Shares, books, standard_library, train_tokenizer
from benchmarks.embedded.plant import plant_previous_token_head
from benchmarks.recall import draw_facts

SEED = 20261122
SAVE_EVERY = 50
DECAY = 0.35
MUON_RATE = 0.02
ADAM_RATE = 3e-3
WARMUP_STEPS = 40


@dataclass(frozen=True)
class Phase:
    """`steps` optimiser steps on `rows` sequences of `context` tokens, drawn by `shares`.

    plant: write a previous-token head into the first layer before the first of them.
    """

    steps: int
    rows: int
    context: int
    shares: Shares
    plant: bool = False


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


def orthogonalise(matrix: Tensor) -> Tensor:
    """Five Newton-Schulz steps towards the nearest orthogonal matrix (arXiv 2502.16982), in the matrix's own dtype.

    torch.optim.Muon does this in bfloat16, which a CPU without bf16 arithmetic runs far slower.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every matrix moves by the same root-mean-square, whatever its gradient's spectrum."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(buffer, group["momentum"]))
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def prepare(folder: Path, work: Path) -> tuple[Tokenizer, np.ndarray, np.ndarray]:
    """The tokenizer and the token streams of prose and code, made once and kept in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / "tokenizer.json"
    if not (work / "code.npy").exists():
        prose, code = books(folder), standard_library(held_out=False)
        rng = random.Random(SEED)
        excerpts = [text[i : i + 100_000] for text in prose for i in [rng.randrange(max(len(text) - 100_000, 1))]]
        excerpts += [text[:20_000] for text in rng.sample(code, min(250, len(code)))]
        facts = [fact for _ in range(500) for fact in draw_facts(rng, 40)]
        tokenizer = train_tokenizer(excerpts + [f.statement + f.question for f in facts])
        tokenizer.save(str(path))
        for name, texts in (("prose", prose), ("code", code)):
            ids = [i for e in tokenizer.encode_batch_fast(texts) for i in e.ids]
            np.save(work / f"{name}.npy", np.array(ids, np.uint16))
    return Tokenizer.from_file(str(path)), np.load(work / "prose.npy"), np.load(work / "code.npy")


def rate(step: int, total: int) -> float:
    """The share of the peak learning rate: a short warm-up, a plateau, a linear decay to zero."""
    return min((step + 1) / WARMUP_STEPS, 1.0, (total - step) / (DECAY * total))


def loss_of(model: nn.Module, ids: Tensor, weights: Tensor) -> Tensor:
    logits = model(ids[:, :-1], use_cache=False).logits
    losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    wanted = weights[:, 1:].flatten()
    return (losses * wanted).sum() / wanted.sum()


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config, float16 safetensors and the fast tokenizer."""
    state = LlamaForCausalLM(model.config)
    state.load_state_dict(model.state_dict())
    state.half().save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)
    fast.padding_side = "left"
    fast.model_max_length = 8192
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
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = Muon(matrices, lr=MUON_RATE)
    adam = torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    total, done = sum(p.steps for p in PHASES), 0
    checkpoint = work / "state.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(saved["model"])
        muon.load_state_dict(saved["muon"])
        adam.load_state_dict(saved["adam"])
        done = saved["step"]
    start, begun = done, time.monotonic()
    for step, (phase, within) in enumerate((p, i) for p in PHASES for i in range(p.steps)):
        if step < start:
            continue
        if phase.plant and within == 0:
            plant_previous_token_head(model, torch.Generator().manual_seed(SEED))
        mixture = Mixture(tokenizer, prose, code, seed=SEED + step)
        ids, weights = (torch.from_numpy(a).to(device) for a in mixture.batch(phase.rows, phase.context, phase.shares))
        loss = loss_of(model, ids, weights)
        loss.backward()
        nn.utils.clip_grad_norm_(others, 1.0)
        for optimiser, peak in ((muon, MUON_RATE), (adam, ADAM_RATE)):
            for group in optimiser.param_groups:
                group["lr"] = peak * rate(step, total)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        done = step + 1
        if done % 10 == 0 or done == total:
            minutes = (time.monotonic() - begun) / 60
            print(f"step {done}/{total} context {phase.context} loss {loss.item():.4f} {minutes:.1f} min", flush=True)
        if done % SAVE_EVERY == 0 or done == total:
            state = {"model": model.state_dict(), "muon": muon.state_dict(), "adam": adam.state_dict(), "step": done}
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    export(model, tokenizer, work / "model")


if __name__ == "__main__":
    typer.run(train)
