"""`python -m benchmarks memory`: the command line of `benchmarks.memory`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import memory
from benchmarks.memory import Settings
from benchmarks.options import Resume, telling_errors
from kvcompress.planning import parse_count, parse_size


def command(
    geometries: Annotated[
        str, typer.Option(help="shipped geometries, model folders or hub ids, with spaces between")
    ] = " ".join(Settings.geometries),
    specs: Annotated[str, typer.Option(help="specs of ours to measure, with spaces between")] = " ".join(memory.SPECS),
    baselines: Annotated[bool, typer.Option(help="measure transformers' QuantizedCache (quanto) too")] = True,
    contexts: Annotated[str, typer.Option(help="tokens to measure at, with spaces between; k is 1024, M is 1024k")] = (
        "1k 2k 4k 8k 16k 32k 64k 128k 256k 512k 1M"
    ),
    chunk: Annotated[int, typer.Option(help="tokens fed at a time")] = Settings.chunk,
    budget: Annotated[
        str, typer.Option(help="uncompressed keys and values that are held at once: more is filled layer by layer")
    ] = "1GiB",
    minutes: Annotated[float, typer.Option(help="minutes that one cache of one layer may take")] = Settings.minutes,
    gpu: Annotated[str, typer.Option(help="memory of the device that tokens are to fit on")] = "80GB",
    reserve: Annotated[str, typer.Option(help="of that, what is set aside for activations")] = "2GiB",
    weight_bits: Annotated[float, typer.Option(help="bits of a parameter on that device")] = Settings.weight_bits,
    seed: Annotated[int, typer.Option(help="what is drawn: the tokens")] = Settings.seed,
    resume: Resume = True,
    output: Annotated[Path, typer.Option(help="folder for results.jsonl, table.md, fits.json, memory.png")] = Path(
        "benchmarks/results/memory"
    ),
) -> None:
    """Measured bytes of every cache up to a million tokens, for geometries of known models, and what fits a device.

    A later run with more --minutes fills what an earlier one had to leave to the slope.
    """
    with telling_errors():
        settings = Settings(
            tuple(geometries.split()),
            tuple(specs.split()),
            baselines,
            tuple(map(parse_count, contexts.split())),
            chunk,
            parse_size(budget),
            minutes,
            parse_size(gpu),
            parse_size(reserve),
            weight_bits,
            seed,
        )
        memory.run(settings, output, Console(), fresh=not resume)
