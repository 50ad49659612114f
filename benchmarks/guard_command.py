"""``python -m benchmarks guard``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from benchmarks import guard
from benchmarks.comparison import as_text
from benchmarks.options import telling_errors


def command(
    tolerance: Annotated[float, typer.Option(help="factor on every bound of noise of `compare`")] = 4.0,
    update: Annotated[bool, typer.Option("--update", help="replace the results that runs are held against")] = False,
) -> None:
    """A small `quick` on a fixed text, held against the results in benchmarks/results/guard, with wide bounds.

    Exit status 1: something got worse.
    """
    with telling_errors():
        found = guard.run(tolerance, update, Console())
    if found is not None:
        print("\n".join(as_text(found)))
    if found is not None and found.worse:
        raise typer.Exit(1)
