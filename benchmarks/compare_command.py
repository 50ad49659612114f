"""``python -m benchmarks compare OLD NEW``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.comparison import as_text, compare
from benchmarks.measurements import read
from benchmarks.options import telling_errors


def command(
    old: Annotated[Path, typer.Argument(help="file of results, or folder: all .jsonl files below it")],
    new: Annotated[Path, typer.Argument(help="what to hold against it")],
    tolerance: Annotated[float, typer.Option(help="factor on every bound of noise")] = 1.0,
    times: Annotated[bool, typer.Option(help="compare times of the machine too, not only ratios of one run")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """What got worse, better, appeared and vanished from OLD to NEW, beyond noise; results of any benchmark.

    Exit status 1: something got worse.
    """
    with telling_errors():
        found = compare(read(old), read(new), tolerance, times)
    print(json.dumps(asdict(found)) if as_json else "\n".join(as_text(found)))
    if found.worse:
        raise typer.Exit(1)
