"""``python -m benchmarks retrieval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import retrieval
from benchmarks.haystack import TASKS
from benchmarks.options import Model, Resume, telling_errors, whole_numbers
from benchmarks.retrieval import SPECS, Settings


def command(
    tasks: Annotated[str, typer.Option(help="what to look for, with spaces between")] = " ".join(TASKS),
    lengths: Annotated[str, typer.Option(help="tokens of a document, with spaces between")] = " ".join(
        map(str, Settings.lengths)
    ),
    depths: Annotated[int, typer.Option(help="depths of the single needle, in even steps")] = Settings.depths,
    specs: Annotated[str, typer.Option(help="specs to measure, with spaces between")] = " ".join(SPECS),
    baselines: Annotated[bool, typer.Option(help="measure transformers' QuantizedCache too")] = True,
    model: Model = None,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="the model's weights in 4 bits, by bitsandbytes")
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(help="text file for haystack  [default: War and Peace where it is, else library modules]"),
    ] = None,
    seeds: Annotated[int, typer.Option(help="documents for each task, length and depth")] = Settings.seeds,
    chunk: Annotated[int, typer.Option(help="tokens fed at a time; an eighth of the length at most")] = Settings.chunk,
    keys: Annotated[
        int, typer.Option(help="facts of a multi-key document; one for 128 tokens at most")
    ] = Settings.keys,
    values: Annotated[int, typer.Option(help="values of the key of a multi-value document")] = Settings.values,
    hops: Annotated[int, typer.Option(help="assignments after the first of a chain of variables")] = Settings.hops,
    resume: Resume = True,
    output: Annotated[Path, typer.Option(help="folder for results.jsonl, table.md, heatmaps.png")] = Path(
        "benchmarks/results/retrieval"
    ),
) -> None:
    """What can still be found in a long text: needles by length and depth, many keys, many values, variables."""
    with telling_errors():
        settings = Settings(
            tasks=tuple(tasks.split()),
            lengths=whole_numbers(lengths, "lengths"),
            depths=depths,
            specs=tuple(specs.split()),
            baselines=baselines,
            model=model,
            load_in_4bit=load_in_4bit,
            text=text,
            seeds=seeds,
            chunk=chunk,
            keys=keys,
            values=values,
            hops=hops,
        )
        retrieval.run(settings, output, Console(), fresh=not resume)
