"""``python -m benchmarks report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.options import telling_errors
from benchmarks.report import job
from benchmarks.report.job import Settings
from kvcompress.planning import parse_size


def command(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="files and folders of results  [default: all under benchmarks/results]", show_default=False
        ),
    ] = None,
    gpu: Annotated[str, typer.Option(help="memory of the device whose limit is drawn")] = "80GB",
    output: Annotated[Path, typer.Option(help="folder for report.html and report.md")] = Path(
        "benchmarks/results/report"
    ),
) -> None:
    """One page (HTML without anything to load, and Markdown) of all that was measured, and of what was not."""
    with telling_errors():
        settings = Settings(tuple(paths or Settings.paths), parse_size(gpu))
        job.run(settings, output, Console())
