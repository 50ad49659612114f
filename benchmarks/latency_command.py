"""``python -m benchmarks latency``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import latency
from benchmarks.latency import Settings
from benchmarks.options import LoadIn4Bit, Model, Resume, telling_errors, whole_numbers


def command(
    model: Model = None,
    load_in_4bit: LoadIn4Bit = False,
    contexts: Annotated[str, typer.Option(help="tokens of context, with spaces between")] = " ".join(
        map(str, Settings.contexts)
    ),
    batches: Annotated[str, typer.Option(help="rows of a batch, with spaces between")] = " ".join(
        map(str, Settings.batches)
    ),
    specs: Annotated[str, typer.Option(help="specs to measure, with spaces between")] = " ".join(latency.SPECS),
    baselines: Annotated[bool, typer.Option(help="measure transformers' QuantizedCache too")] = True,
    repetitions: Annotated[int, typer.Option(help="timed rounds, after one that warms up")] = Settings.repetitions,
    chunk: Annotated[int, typer.Option(help="tokens of the prompt fed at a time")] = Settings.chunk,
    steps: Annotated[int, typer.Option(help="decode steps after each prompt")] = Settings.steps,
    seed: Annotated[int, typer.Option(help="what the prompt is drawn by")] = Settings.seed,
    resume: Resume = True,
    output: Annotated[Path, typer.Option(help="folder for results.jsonl, table.md and decode.png")] = Path(
        "benchmarks/results/latency"
    ),
) -> None:
    """Time to first token and decode speed by context and batch, all caches taking turns on this machine."""
    with telling_errors():
        settings = Settings(
            model,
            load_in_4bit,
            whole_numbers(contexts, "contexts"),
            whole_numbers(batches, "batches"),
            tuple(specs.split()),
            baselines,
            repetitions,
            chunk,
            steps,
            seed,
        )
        latency.run(settings, output, Console(), fresh=not resume)
