"""``python -m benchmarks offload``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import offload
from benchmarks.offload import Settings
from benchmarks.options import LoadIn4Bit, Model, Resume, telling_errors, whole_numbers


def command(
    model: Model = None,
    load_in_4bit: LoadIn4Bit = False,
    contexts: Annotated[str, typer.Option(help="tokens held, with spaces between")] = " ".join(
        map(str, Settings.contexts)
    ),
    specs: Annotated[str, typer.Option(help="specs to measure, with spaces between")] = " ".join(Settings.specs),
    budgets: Annotated[
        str, typer.Option(help="percent of the pages that may be on the device, with spaces between")
    ] = " ".join(map(str, Settings.budgets)),
    steps: Annotated[int, typer.Option(help="timed decode steps for each budget")] = Settings.steps,
    folder: Annotated[Path | None, typer.Option(help="folder for offloaded pages  [default: the system's]")] = None,
    seed: Annotated[int, typer.Option(help="what is drawn: the tokens held")] = Settings.seed,
    resume: Resume = True,
    output: Annotated[Path, typer.Option(help="folder for results.jsonl, table.md and steps.png")] = Path(
        "benchmarks/results/offload"
    ),
) -> None:
    """Time of decode steps whose pages are on the device in part, against all of them there."""
    with telling_errors():
        counts = whole_numbers(contexts, "contexts"), whole_numbers(budgets, "budgets")
        settings = Settings(model, load_in_4bit, counts[0], tuple(specs.split()), counts[1], steps, folder, seed)
        offload.run(settings, output, Console(), fresh=not resume)
