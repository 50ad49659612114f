"""The job `python -m benchmarks latency`: how long prefill and decode steps take, by context, batch and cache.

All caches of a case (a context and a batch) take turns: in each round every one of them reads the same prompt from
empty, `chunk` tokens at a time, and then takes its decode steps. So all see the same machine, and only one of them is
held at a time. The first round is not timed: it warms up, and memory is watched in it. Tokens are drawn at random,
since what they say does not change what they cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import latency_plot, latency_tables, subjects
from benchmarks.caches import UNCOMPRESSED, Contender, contenders
from benchmarks.device import release, with_peak
from benchmarks.latency_rows import Row, empty_row, watched
from benchmarks.log import Log, open_log
from benchmarks.options import at_least
from benchmarks.progress import bar
from benchmarks.results import failed
from benchmarks.storage import cache_bytes
from benchmarks.timing import Quartiles, reading
from kvcompress import CompressedCache

#: What is measured unless the user says otherwise: ours beside the peers' methods of as many bits.
SPECS = ("exact", "fp8", "lloyd3", "trellis3", "spectral3", "prerope+spectral3", "turboquant3", "kivi4", "kvquant3")


@dataclass(frozen=True)
class Settings:
    """What to measure. contexts and chunk in tokens, batches in rows; steps: decode steps after each prefill."""

    model: str | None = None
    load_in_4bit: bool = False
    contexts: tuple[int, ...] = (1024, 4096, 16384)
    batches: tuple[int, ...] = (1, 4)
    specs: tuple[str, ...] = SPECS
    baselines: bool = True
    repetitions: int = 3
    chunk: int = 512
    steps: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("contexts", "batches"):
            given = getattr(self, name)
            if not given or min(given) < 1:
                raise ValueError(f"{name} must be one or more numbers of at least 1, got {given}")
        at_least(self, repetitions=1, chunk=1, steps=1, seed=0)

    def of_rows(self) -> dict[str, object]:
        """What a row depends on beside its context, batch and cache."""
        names = ("model", "load_in_4bit", "repetitions", "chunk", "steps", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass
class Turns:
    """Seconds of one cache's turns: until the first token, and of each decode step."""

    first: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """A prompt [B, N] that all caches read, and how."""

    model: PreTrainedModel
    ids: Tensor
    settings: Settings

    @classmethod
    def of(cls, model: PreTrainedModel, context: int, batch: int, settings: Settings) -> Case:
        generator = torch.Generator().manual_seed(settings.seed)
        ids = torch.randint(model.config.get_text_config().vocab_size, (batch, context), generator=generator)
        return cls(model, ids.to(model.device), settings)

    def turn(self, contender: Contender) -> tuple[Turns, int, dict[str, int] | None]:
        """A prefill and its decode steps: their times, the cache's bytes after them, and what it counted."""
        cache = contender.make(self.model.config)
        first, token = reading(self.model, contender, cache, self.ids, self.settings.chunk)
        turns = Turns([first])
        for _ in range(self.settings.steps):
            seconds, token = reading(self.model, contender, cache, token, 1)
            turns.steps.append(seconds)
        return turns, cache_bytes(cache), cache.stats() if isinstance(cache, CompressedCache) else None

    def measured(self, pairs: Sequence[tuple[Contender, Row]], advance: Callable[[], object]) -> list[Row]:
        """The rows with what their caches took; one that breaks is left out of the rounds after that."""
        rows = {contender.name: row for contender, row in pairs}
        times = {contender.name: Turns() for contender, _ in pairs}
        for timed in (False, *[True] * self.settings.repetitions):
            for contender, _ in pairs:
                name = contender.name
                if rows[name].status == "ok":
                    try:
                        if timed:
                            turns, _, _ = self.turn(contender)
                            times[name].first += turns.first
                            times[name].steps += turns.steps
                        else:
                            (_, size, stats), peak = with_peak(partial(self.turn, contender), self.model.device)
                            rows[name] = watched(rows[name], contender, self.model, size, stats, peak)
                    except Exception as error:  # a cache that breaks is a result to show
                        rows[name] = failed(rows[name], error)
                    release(self.model.device)
                advance()
        return with_times(list(rows.values()), times)


def with_times(rows: Sequence[Row], times: dict[str, Turns]) -> list[Row]:
    """The rows that are ok with their medians and quartiles, and their ratios to the uncompressed cache's."""
    found: dict[str, tuple[Quartiles, Quartiles]] = {
        row.cache: (Quartiles.of(times[row.cache].first), Quartiles.of(times[row.cache].steps))
        for row in rows
        if row.status == "ok"
    }
    base = found.get(UNCOMPRESSED.name)
    return [row.timed(*found[row.cache], base) if row.cache in found else row for row in rows]


@dataclass(frozen=True)
class Run:
    """A run under way: its model, what it measures, the log that it writes, and how it shows where it is."""

    model: PreTrainedModel
    settings: Settings
    log: Log[Row]
    progress: Progress

    def all(self) -> None:
        """Add all missing rows to the log, case by case."""
        chosen = contenders(self.settings.specs, self.settings.baselines)
        cases = [(context, batch) for batch in self.settings.batches for context in self.settings.contexts]
        rounds = self.settings.repetitions + 1
        open_ones = {case: self._open(chosen, *case) for case in cases}
        total = sum(context * batch * len(pairs) * rounds for (context, batch), pairs in open_ones.items())
        task = self.progress.add_task("latency", total=total)
        for (context, batch), pairs in open_ones.items():
            self.progress.update(task, description=f"{batch} x {context} tokens: {len(pairs)} caches")
            if pairs:
                case = Case.of(self.model, context, batch, self.settings)
                for row in case.measured(pairs, partial(self.progress.advance, task, context * batch)):
                    if not self.log.done(row.key):
                        self.log.add(row)

    def _open(self, chosen: Sequence[Contender], context: int, batch: int) -> list[tuple[Contender, Row]]:
        """What is to take turns: what has no row yet, beside the uncompressed cache, which the rest is held against.

        What cannot run here gets its row at once.
        """
        found = []
        for contender in chosen:
            row = empty_row(contender, context, batch, self.settings.seed)
            if contender.missing is not None:
                self.log.add(replace(row, status=contender.lack, reason=contender.missing))
            elif not self.log.done(row.key):
                found.append((contender, row))
        if found and found[0][0] is not UNCOMPRESSED:
            found.insert(0, (UNCOMPRESSED, empty_row(UNCOMPRESSED, context, batch, self.settings.seed)))
        return found


def save(folder: Path, rows: Sequence[Row], title: str) -> list[Path]:
    """Write table.md and decode.png into the folder; returns their paths."""
    table, picture = folder / "table.md", folder / "decode.png"
    table.write_text(latency_tables.document(rows, title))
    latency_plot.plot(picture, rows, title)
    return [table, picture]


def run(settings: Settings, output: Path, console: Console, fresh: bool = False) -> list[Row]:
    """Measure what is not measured yet, and write everything that the folder `output` then holds.

    fresh: forget the rows that it holds. Raises ValueError for settings or specs that make no sense, or that disagree
    with the rows in the folder; OSError for a model that is not there.
    """
    contenders(settings.specs)  # a wrong spec is told before the model is loaded
    log = open_log(output, "latency", Row, settings.of_rows(), fresh, options=asdict(settings))
    model, _ = subjects.load(settings.model, settings.load_in_4bit)
    with bar(console, 48) as progress:
        Run(model, settings, log, progress).all()
    log.rewrite()
    title = f"{subjects.described(settings.model, model)}; prompts in chunks of {settings.chunk} tokens"
    written = [log.path, *save(output, log.rows, title)]
    console.print(*latency_tables.short(log.rows))
    for remark in latency_tables.remarks(log.rows):
        console.print(remark, style="yellow", markup=False)
    console.print("Written: " + ", ".join(map(str, written)), markup=False, soft_wrap=True)
    return log.rows
