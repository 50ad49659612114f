"""``python -m benchmarks scaling``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import scaling
from benchmarks.options import telling_errors
from benchmarks.scaling import Settings


def command(
    quality: Annotated[Path, typer.Option(help="results.jsonl of quality")] = Settings.quality,
    million: Annotated[
        Path, typer.Option(help="results.jsonl of million; left out where there is none")
    ] = Settings.million,
    subjects: Annotated[
        str,
        typer.Option(help="subjects of quality to fit, with spaces between; the first one's fits are kept for plan"),
    ] = " ".join(Settings.subjects),
    coefficients: Annotated[
        Path | None, typer.Option(help="file for what kvcompress plan --fits reads  [default: fits.json in --output]")
    ] = None,
    output: Annotated[Path, typer.Option(help="folder for results.jsonl, table.md and scaling.png")] = Path(
        "benchmarks/results/scaling"
    ),
) -> None:
    """Quality against bits, rank, context and position: lines fitted to the results of quality and million."""
    with telling_errors():
        scaling.run(Settings(quality, million, tuple(subjects.split())), output, Console(), coefficients)
