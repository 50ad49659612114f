"""``python -m benchmarks lmeval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import lmeval
from benchmarks.lmeval import Settings
from benchmarks.options import Model, Resume, telling_errors
from kvcompress import DEFAULT_SPEC


def command(
    tasks: Annotated[str, typer.Option(help="lm-eval's tasks or groups, with spaces between")],
    specs: Annotated[str, typer.Option(help="specs to measure, with spaces between")] = DEFAULT_SPEC,
    model: Model = None,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="the model's weights in 4 bits, by bitsandbytes")
    ] = False,
    folder: Annotated[Path | None, typer.Option(help="folder of more tasks, in lm-eval's YAML")] = None,
    shots: Annotated[int | None, typer.Option(help="examples before a question  [default: the task's own]")] = None,
    limit: Annotated[int | None, typer.Option(help="questions of a task  [default: all]")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="ask by the model's chat template")] = False,
    batch: Annotated[int, typer.Option(help="texts read at a time")] = Settings.batch,
    chunk: Annotated[
        int, typer.Option(help="tokens fed at a time; fewer make more of a text attend to codes, and take longer")
    ] = Settings.chunk,
    seed: Annotated[int, typer.Option(help="what lm-eval draws examples by")] = Settings.seed,
    resume: Resume = True,
    output: Annotated[Path, typer.Option(help="folder for results.jsonl and table.md")] = Path(
        "benchmarks/results/lmeval"
    ),
) -> None:
    """Tasks of lm-eval through its HFLM, every text read through each cache (pip install -e '.[eval]')."""
    with telling_errors():
        settings = Settings(
            tasks=tuple(tasks.split()),
            specs=tuple(specs.split()),
            model=model,
            load_in_4bit=load_in_4bit,
            folder=folder,
            shots=shots,
            limit=limit,
            chat=chat,
            batch=batch,
            chunk=chunk,
            seed=seed,
        )
        lmeval.run(settings, output, Console(), fresh=not resume)
