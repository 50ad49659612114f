"""Train the marathon model: ``python -m benchmarks.marathon.train BOOKS --work DIR``.

It begins with the embedded model's weights (`model.begin_from`) and its tokenizer and text, at half the learning rate.
After 450 steps a look-up is planted (`plant`), since a single head does not soon learn to look back by itself. Then the
look-up is made exact (`match`), and what stands above it learns to read it in documents of up to 262,144 tokens
(`lengthen`), the second time with answers weighing more; at last the look-up is matched once more, on facts too. The
shipped weights come from a run to which phases were added when those before were done, their learning rate having
fallen to zero, and whose last stage began at the exported weights of the one before.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors.torch import load_model, save_model
from torch import Tensor

from benchmarks.embedded.corpus import Mixture, Shares
from benchmarks.embedded.loop import Phase, optimise
from benchmarks.embedded.train import SEED, export, prepare
from benchmarks.marathon.lengthen import Documents, Lengthening, lengthen
from benchmarks.marathon.match import Matching, match
from benchmarks.marathon.model import GLOBAL, TRAINING, begin_from
from benchmarks.marathon.plant import plant_lookup
from kvcompress import models

PEAK = 0.5  # of the learning rates that the embedded model was trained at
PHASES = (
    Phase(steps=120, rows=32, context=256, shares=Shares(recall=0.35, code=0.05, repeat=0.25, spacing=28)),
    Phase(steps=150, rows=8, context=1024, shares=Shares(recall=0.45, code=0.05, repeat=0.15, spacing=40)),
    Phase(steps=120, rows=2, context=4096, shares=Shares(recall=0.50, code=0.05, repeat=0.0, spacing=64)),
    Phase(steps=60, rows=1, context=16384, shares=Shares(recall=0.60, code=0.0, repeat=0.0, spacing=128)),
    Phase(steps=110, rows=32, context=256, shares=Shares(recall=0.55, code=0.05, repeat=0.15, spacing=28), plant=True),
    Phase(steps=60, rows=8, context=1024, shares=Shares(recall=0.55, code=0.05, repeat=0.10, spacing=40)),
    Phase(steps=30, rows=2, context=4096, shares=Shares(recall=0.60, code=0.05, repeat=0.0, spacing=64)),
    Phase(steps=20, rows=1, context=16384, shares=Shares(recall=0.70, code=0.0, repeat=0.0, spacing=128)),
    Phase(steps=230, rows=2, context=4096, shares=Shares(recall=0.25, code=0.10, repeat=0.02, spacing=64)),
    Phase(steps=80, rows=1, context=16384, shares=Shares(recall=0.30, code=0.10, repeat=0.0, spacing=128)),
    Phase(steps=12, rows=1, context=65536, shares=Shares(recall=0.40, code=0.10, repeat=0.0, spacing=256)),
)
LONG = 32_768  # tokens of the documents that the look-up is made exact on
LENGTHENINGS = (Lengthening(), Lengthening(documents=14, recall=0.7, answer_weight=8.0))
MATCHINGS = (Matching(), Matching(documents=24, softer=1.0, rate=3e-4))
ASKING = Lengthening(shortest=LONG, longest=LONG, blocks=3, recall=1.0, answer_weight=2.0)  # documents of the second
SAMPLE = 8000  # tokens of text that the look-up is fitted on


def train(
    books: Annotated[Path, typer.Argument(help="folder of .txt books; War and Peace in it is left out")],
    work: Annotated[Path, typer.Option(help="where tokens, checkpoints and the exported model go")] = Path("marathon"),
) -> None:
    """Train, then export to WORK/model; run again to resume."""
    source, fast = models.embedded()
    tokenizer, prose, code = prepare(books, work, fast.backend_tokenizer)
    model = begin_from(source)
    model.set_attn_implementation(TRAINING)
    model.to("cuda" if torch.cuda.is_available() else "cpu").train()  # type: ignore[arg-type]

    def draw(step: int, phase: Phase) -> tuple[np.ndarray, np.ndarray]:
        return Mixture(tokenizer, prose, code, seed=SEED + 10_000 + step).batch(phase.rows, phase.context, phase.shares)

    def plant() -> None:
        sample = torch.from_numpy(prose[:SAMPLE].astype(np.int64)).unsqueeze(0)
        plant_lookup(model, GLOBAL, sample, torch.Generator().manual_seed(SEED))

    optimise(model, PHASES, draw, work / "state.pt", PEAK, plant)
    rng = random.Random(SEED)
    asking = Documents(fast.backend_tokenizer, prose, code, ASKING, SEED)

    def plain() -> tuple[Tensor, Tensor]:
        start = rng.randrange(len(prose) - LONG)
        ids = np.concatenate([[0], prose[start : start + LONG].astype(np.int64)])
        return torch.from_numpy(ids).unsqueeze(0), torch.zeros(0, dtype=torch.int64)

    def with_facts() -> tuple[Tensor, Tensor]:
        ids, weights, _ = asking.draw()
        return ids, (weights > 1).nonzero().squeeze(1) - 1

    def matched(stage: int) -> None:
        for number, loss in match(model, (plain, with_facts)[stage], MATCHINGS[stage]):
            print(f"matching, document {number + 1} loss {loss:.4f}", flush=True)

    def lengthened(stage: int) -> None:
        documents = Documents(fast.backend_tokenizer, prose, code, LENGTHENINGS[stage], SEED + stage)
        for number, tokens, loss in lengthen(model, documents):
            print(f"document {number + 1}/{documents.settings.documents} tokens {tokens} loss {loss:.4f}", flush=True)

    stages = {"matched": partial(matched, 0)}
    stages |= {f"lengthened-{i}": partial(lengthened, i) for i in range(len(LENGTHENINGS))}
    stages |= {"matched-1": partial(matched, 1)}
    for name, stage in stages.items():
        done = work / f"{name}.safetensors"
        if done.exists():
            load_model(model, done)
        else:
            stage()
            save_model(model, str(done))
    export(model, tokenizer, work / "model")


if __name__ == "__main__":
    typer.run(train)
