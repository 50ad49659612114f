"""``python -m benchmarks prefix``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import prefix
from benchmarks.options import LoadIn4Bit, Model, Resume, telling_errors, whole_numbers
from benchmarks.prefix import Settings


def command(
    model: Model = None,
    load_in_4bit: LoadIn4Bit = False,
    text: Annotated[
        Path | None, typer.Option(help="text file  [default: library modules that training never saw]")
    ] = None,
    contexts: Annotated[str, typer.Option(help="tokens that prompts have in common, with spaces between")] = " ".join(
        map(str, Settings.contexts)
    ),
    specs: Annotated[str, typer.Option(help="specs to measure, with spaces between")] = " ".join(prefix.SPECS),
    question: Annotated[int, typer.Option(help="tokens of each prompt's own")] = Settings.question,
    repetitions: Annotated[int, typer.Option(help="timed prompts, after one that is stored")] = Settings.repetitions,
    chunk: Annotated[int, typer.Option(help="tokens of a prompt fed at a time")] = Settings.chunk,
    seed: Annotated[int, typer.Option(help="what the text's modules are ordered by")] = Settings.seed,
    resume: Resume = True,
    output: Annotated[Path, typer.Option(help="folder for results.jsonl, table.md and first-token.png")] = Path(
        "benchmarks/results/prefix"
    ),
) -> None:
    """Time to first token of prompts whose beginning a prefix store has, in memory or on disk, and without it."""
    with telling_errors():
        settings = Settings(
            model,
            load_in_4bit,
            text,
            whole_numbers(contexts, "contexts"),
            tuple(specs.split()),
            question,
            repetitions,
            chunk,
            seed,
        )
        prefix.run(settings, output, Console(), fresh=not resume)
