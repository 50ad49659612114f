"""``python -m benchmarks million``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import million
from benchmarks.million import Settings
from benchmarks.options import LoadIn4Bit, Resume, telling_errors


def command(
    specs: Annotated[str, typer.Option(help="specs to measure, with spaces between")] = " ".join(million.SPECS),
    tokens: Annotated[int, typer.Option(help="tokens of the document")] = Settings.tokens,
    chunk: Annotated[int, typer.Option(help="tokens fed at a time")] = Settings.chunk,
    facts: Annotated[int, typer.Option(help="facts in the document, each asked for at its end")] = Settings.facts,
    seed: Annotated[int, typer.Option(help="what the facts are drawn by")] = Settings.seed,
    model: Annotated[str | None, typer.Option(help="model folder or hub id  [default: the marathon model]")] = None,
    load_in_4bit: LoadIn4Bit = False,
    text: Annotated[
        Path | None, typer.Option(help="text file  [default: War and Peace where it is, and held-out library modules]")
    ] = None,
    resume: Resume = True,
    output: Annotated[Path, typer.Option(help="folder for results.jsonl, table.md and million.png")] = Path(
        "benchmarks/results/million"
    ),
) -> None:
    """Perplexity by position and recall by depth in one document of a million tokens, read through each cache."""
    with telling_errors():
        settings = Settings(tuple(specs.split()), tokens, chunk, facts, seed, model, load_in_4bit, text)
        million.run(settings, output, Console(), fresh=not resume)
