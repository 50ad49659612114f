"""The job `python -m benchmarks parallel`: what ranks hold of one context, what goes between them, and an estimate.

Measured on processes of this machine (`parallel_worker`), with NCCL where every one has a GPU of its own, else gloo;
bytes do not depend on that. Calculated for machines that are not at hand (`parallel_estimate`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as processes
from rich.console import Console
from torch.multiprocessing.spawn import ProcessException

from benchmarks import parallel_estimate, parallel_tables, parallel_worker
from benchmarks.caches import Contender, compressed
from benchmarks.log import open_log, readable
from benchmarks.options import at_least
from benchmarks.parallel_estimate import Estimate, Machine, estimate
from benchmarks.parallel_rows import Row
from benchmarks.parallel_worker import Work
from benchmarks.progress import bar
from kvcompress.spec import DEFAULT_SPEC

MACHINE = Machine()


@dataclass(frozen=True)
class Settings:
    """What to measure: specs by numbers of ranks. context and chunk in tokens; steps: decode steps after the prefill.

    geometry, tokens, machine: what to calculate, with the first of the specs.
    """

    model: str | None = None
    load_in_4bit: bool = False
    text: Path | None = None
    specs: tuple[str, ...] = (str(DEFAULT_SPEC), "trellis3", "kivi4")
    ranks: tuple[int, ...] = (1, 2, 4)
    context: int = 4096
    chunk: int = 512
    steps: int = 4
    seed: int = 0
    geometry: str = "Llama-3.1-8B"
    tokens: int = 10_000_000
    machine: Machine = MACHINE

    def __post_init__(self) -> None:
        if not self.specs:
            raise ValueError("at least one spec must be named, got none")
        if not self.ranks or list(self.ranks) != sorted(set(self.ranks)) or self.ranks[0] < 1:
            raise ValueError(f"ranks must be numbers of at least 1, each once and ascending, got {self.ranks}")
        at_least(self, context=1, chunk=1, steps=1, seed=0, tokens=1)

    def of_rows(self) -> dict[str, Any]:
        """What a row depends on beside its cache and ranks."""
        text = None if self.text is None else str(self.text)
        names = ("model", "load_in_4bit", "context", "chunk", "steps", "seed")
        return {name: getattr(self, name) for name in names} | {"text": text}

    def options(self) -> dict[str, Any]:
        """What the command was asked for, but for the machine that is calculated."""
        more = {"specs": self.specs, "ranks": self.ranks, "geometry": self.geometry, "tokens": self.tokens}
        return self.of_rows() | more

    def contenders(self) -> list[Contender]:
        """The caches; raises ValueError for a spec that is none."""
        return [compressed(spec) for spec in self.specs]

    def estimates(self) -> list[Estimate]:
        """For one GPU, two, and so on up to the machine's."""
        counts = [2**power for power in range(self.machine.gpus.bit_length()) if 2**power < self.machine.gpus]
        machines = [Machine(**{**asdict(self.machine), "gpus": gpus}) for gpus in [*counts, self.machine.gpus]]
        return [estimate(self.geometry, self.specs[0], self.tokens, 4096, machine) for machine in machines]


def measured(work: Work) -> Iterator[Row]:
    """Rows as rank 0 writes them; raises ChildProcessError where a process ends before its time."""
    running = processes.start_processes(
        parallel_worker.run, args=(work,), nprocs=work.world, join=False, start_method="spawn"
    )
    told, over = 0, False
    while not over:
        try:
            over = bool(running.join(timeout=0.5))
        except ProcessException as error:
            raise ChildProcessError(str(error).strip().splitlines()[-1]) from error
        lines = readable(work.rows.read_text().splitlines()) if work.rows.exists() else []
        yield from (Row(**line) for line in lines[told:])
        told = len(lines)


def save(folder: Path, rows: Sequence[Row], settings: Settings, title: str) -> list[Path]:
    """Write table.md, estimate.json and parallel.png into the folder; returns their paths."""
    table, numbers, picture = (folder / name for name in ("table.md", "estimate.json", "parallel.png"))
    estimates = settings.estimates()
    table.write_text(parallel_tables.document(rows, estimates[-1:], title))
    parallel_estimate.write(numbers, estimates)
    parallel_tables.plot(picture, rows, estimates, title)
    return [table, numbers, picture]


def run(settings: Settings, output: Path, console: Console, fresh: bool = False) -> list[Row]:
    """Measure what is not measured yet, and write everything that the folder `output` then holds.

    fresh: forget the rows that it holds. Raises ValueError for settings or specs that make no sense, or that disagree
    with the rows in the folder; OSError for a model or geometry that is not there.
    """
    contenders = settings.contenders()  # a wrong spec is told before anything is measured
    log = open_log(output, "parallel", Row, settings.of_rows(), fresh, options=settings.options())
    missing = [each.name for each in contenders if not all(log.done((each.name, n)) for n in settings.ranks)]
    counts = sorted({1, *settings.ranks})  # a single rank comes first, which the others are held against
    cells = tuple((name, count) for name in missing for count in counts)
    if cells:
        with bar(console, 40) as progress, tempfile.TemporaryDirectory() as folder:
            names = ("model", "load_in_4bit", "text", "context", "chunk", "steps", "seed")
            work = Work(cells, **{name: getattr(settings, name) for name in names}, folder=Path(folder))
            task = progress.add_task(f"{work.world} processes start", total=len(cells))
            for row in measured(work):
                if row.ranks in settings.ranks:
                    log.add(row)
                progress.update(task, advance=1, description=f"{row.cache}, {row.ranks} ranks")
    log.rewrite()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    title = f"{settings.model or 'embedded model'}, {settings.context + settings.steps:,} tokens, {device}"
    written = [log.path, *save(output, log.rows, settings, title)]
    console.print((output / "table.md").read_text(), markup=False, soft_wrap=True)
    console.print("Written: " + ", ".join(map(str, written)), markup=False, soft_wrap=True)
    return log.rows
