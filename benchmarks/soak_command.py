"""``python -m benchmarks soak``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.options import Model, telling_errors
from kvcompress.serving import requirements


def command(
    minutes: Annotated[float, typer.Option(help="minutes of requests")] = 10,
    model: Model = None,
    spec: Annotated[str, typer.Option(help="spec of the server's caches")] = "trellis3",
    continuous_batching: Annotated[
        bool, typer.Option("--continuous-batching", help="requests share a batch, in place of a prefix store")
    ] = False,
    clients: Annotated[int, typer.Option(help="clients at once")] = 3,
    every: Annotated[float, typer.Option(help="seconds between two looks at the server's memory")] = 1,
    seed: Annotated[int, typer.Option(help="what requests are drawn by")] = 0,
    output: Annotated[Path, typer.Option(help="folder for results.jsonl, table.md and memory.png")] = Path(
        "benchmarks/results/soak"
    ),
) -> None:
    """Mixed requests against `kvcompress serve`: growth of memory, requests lost, its counts against the clients' own.

    Exit status 1: a request was lost, or the counts disagree.
    """
    with telling_errors():
        try:
            requirements.check()
        except ImportError as error:
            raise ValueError(str(error)) from error
        from benchmarks import soak

        settings = soak.Settings(
            minutes=minutes,
            model=model,
            spec=spec,
            continuous_batching=continuous_batching,
            clients=clients,
            every=every,
            seed=seed,
        )
        row = soak.run(settings, output, Console())
    if row.status != "ok":
        raise typer.Exit(1)
