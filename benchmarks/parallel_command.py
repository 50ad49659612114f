"""`python -m benchmarks parallel`: the command line of `benchmarks.parallel`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import parallel
from benchmarks.options import LoadIn4Bit, Model, Resume, telling_errors, whole_numbers
from benchmarks.parallel import MACHINE, Settings
from benchmarks.parallel_estimate import Machine
from kvcompress.units import parse_count, parse_size


def command(
    specs: Annotated[str, typer.Option(help="specs to measure, with spaces between")] = " ".join(Settings.specs),
    ranks: Annotated[str, typer.Option(help="numbers of processes, with spaces between")] = " ".join(
        map(str, Settings.ranks)
    ),
    model: Model = None,
    load_in_4bit: LoadIn4Bit = False,
    text: Annotated[
        Path | None, typer.Option(help="text file  [default: library modules that training never saw]")
    ] = None,
    context: Annotated[int, typer.Option(help="tokens of the prompt")] = Settings.context,
    chunk: Annotated[int, typer.Option(help="tokens fed at a time")] = Settings.chunk,
    steps: Annotated[int, typer.Option(help="decode steps after the prompt")] = Settings.steps,
    seed: Annotated[int, typer.Option(help="what is drawn: the order of modules")] = Settings.seed,
    geometry: Annotated[
        str, typer.Option(help="calculated: a shipped geometry, model folder or hub id")
    ] = Settings.geometry,
    tokens: Annotated[str, typer.Option(help="calculated: tokens of the context; k is 1024, M is 1024k")] = str(
        Settings.tokens
    ),
    gpus: Annotated[int, typer.Option(help="calculated: GPUs")] = MACHINE.gpus,
    gpu: Annotated[str, typer.Option(help="calculated: memory of a GPU")] = "80GB",
    bandwidth: Annotated[str, typer.Option(help="calculated: what a GPU reads of its memory in a second")] = "3350GB",
    link: Annotated[str, typer.Option(help="calculated: what a GPU sends to others in a second")] = "450GB",
    latency: Annotated[float, typer.Option(help="calculated: microseconds of a hop between GPUs")] = 2.0,
    weight_bits: Annotated[float, typer.Option(help="calculated: bits of a parameter")] = MACHINE.weight_bits,
    resume: Resume = True,
    output: Annotated[
        Path, typer.Option(help="folder for results.jsonl, table.md, estimate.json, parallel.png")
    ] = Path("benchmarks/results/parallel"),
) -> None:
    """What processes hold of one context together and what goes between them; and a calculation for many GPUs."""
    with telling_errors():
        sizes = parse_size(gpu), parse_size(bandwidth), parse_size(link)
        settings = Settings(
            model,
            load_in_4bit,
            text,
            tuple(specs.split()),
            whole_numbers(ranks, "ranks"),
            context,
            chunk,
            steps,
            seed,
            geometry,
            parse_count(tokens),
            Machine(gpus, *sizes, latency * 1e-6, weight_bits),
        )
        parallel.run(settings, output, Console(), fresh=not resume)
