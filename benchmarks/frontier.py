"""The job `python -m benchmarks quality`: every codec and rate on one picture, quality against measured bits.

Every cache reads the same documents in the same chunks; see `frontier_subjects` for what they are, `passages` and
`cases` for what is measured on them, `caches` for the lists of caches, and the `frontier_*` files for what is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks import frontier_plot, frontier_reading, frontier_tables, texts
from benchmarks.caches import Contender, field
from benchmarks.cases import filled
from benchmarks.frontier_subjects import DATA, SUBJECTS, Subject, default_text, gather
from benchmarks.log import Log, open_log
from benchmarks.options import at_least
from benchmarks.progress import bar
from benchmarks.rows import Row, empty_row


@dataclass(frozen=True)
class Settings:
    """What to measure. Contexts, chunk and greedy in tokens; specs None for all of ours; seeds: how many, from 0."""

    subjects: tuple[str, ...] = SUBJECTS
    contexts: tuple[int, ...] = (1024, 4096)
    specs: tuple[str, ...] | None = None
    baselines: bool = True
    model: str | None = None
    text: Path | None = None
    seeds: int = 3
    chunk: int = 512
    greedy: int = 64
    load_in_4bit: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.subjects if name not in SUBJECTS]
        if unknown or not self.subjects:
            raise ValueError(f"unknown subject {(unknown or [''])[0]!r}; known: {', '.join(SUBJECTS)}")
        if not self.contexts or min(self.contexts) < texts.SHORTEST:
            raise ValueError(f"contexts must be at least {texts.SHORTEST} tokens each, got {self.contexts}")
        at_least(self, seeds=1, chunk=1, greedy=0)

    def of_rows(self, data: Path) -> dict[str, Any]:
        """What a row depends on beside its subject, context, seed and cache; text None: the held-out modules."""
        book = default_text(data)
        text = book and book.name if self.text is None else str(self.text)
        return {"model": self.model, "text": text, "chunk": self.chunk, "greedy": self.greedy}


@dataclass(frozen=True)
class Run:
    """A run under way: what it measures, the log that it writes, and how it shows where it is."""

    settings: Settings
    log: Log[Row]
    progress: Progress

    def subject(self, subject: Subject) -> None:
        """All missing rows of a subject; raises ValueError where the subject itself cannot be opened."""
        chosen = field(self.settings.specs, self.settings.baselines, subject.window)
        cases = [(context, seed) for context in subject.contexts for seed in range(self.settings.seeds)]
        task = self.progress.add_task(subject.name, total=sum(context for context, _ in cases) * len(chosen))
        for context, seed in cases:
            rows = [empty_row(subject.name, context, seed, contender) for contender in chosen]
            open_ones = [pair for pair in zip(chosen, rows, strict=True) if not self.log.done(pair[1].key)]
            self.progress.advance(task, context * (len(chosen) - len(open_ones)))
            self._case(subject, context, seed, open_ones, task)

    def _case(self, subject: Subject, context: int, seed: int, pairs: list[tuple[Contender, Row]], task: Any) -> None:
        case = None
        for contender, row in pairs:
            self.progress.update(task, description=f"{subject.name} {context} seed {seed}: {contender.name}")
            if contender.missing is not None:
                row = replace(row, status=contender.lack, reason=contender.missing)
            else:
                case = subject.open(context, seed) if case is None else case
                row = filled(case, contender, row)
            self.log.add(row)
            self.progress.advance(task, context)


def measure(settings: Settings, log: Log[Row], console: Console, data: Path = DATA) -> list[str]:
    """Add all missing rows to the log; returns remarks on what is left out. Raises ValueError where nothing is left."""
    found, remarks = gather(settings, data)
    with bar(console, 48) as progress:
        run = Run(settings, log, progress)
        for subject in found:
            try:
                run.subject(subject)
            except ValueError as error:
                remarks.append(f"{subject.name}: left out, {error}")
    if not log.rows:
        raise ValueError("nothing was measured: " + "; ".join(remarks))
    return remarks


def save(folder: Path, rows: Sequence[Row], remarks: Sequence[str]) -> list[Path]:
    """Write frontier.png, pareto.md and reading.md into the folder; returns their paths."""
    picture, tables, reading = (folder / name for name in ("frontier.png", "pareto.md", "reading.md"))
    frontier_plot.plot(picture, rows)
    tables.write_text(frontier_tables.document(rows, remarks))
    reading.write_text(frontier_reading.paragraph(rows) + "\n")
    return [picture, tables, reading]


def run(settings: Settings, output: Path, console: Console, fresh: bool = False, data: Path = DATA) -> list[Row]:
    """Measure what is not measured yet, and write everything that the folder `output` then holds.

    fresh: forget the rows that it holds. Raises ValueError for settings or specs that make no sense, or that disagree
    with the rows in the folder; OSError for a model or text that is not there.
    """
    field(settings.specs, settings.baselines)  # a wrong spec is told before anything is loaded
    options = {**asdict(settings), "text": settings.text and str(settings.text)}
    log = open_log(output, "quality", Row, settings.of_rows(data), fresh, options=options)
    remarks = measure(settings, log, console, data)
    log.rewrite()
    if len(log.commits) > 1:
        remarks.append(f"the rows come from {len(log.commits)} states of the code: {', '.join(log.commits)}")
    written = [log.path, *save(output, log.rows, remarks)]
    console.print((output / "reading.md").read_text(), markup=False)
    for remark in remarks:
        console.print(remark, style="yellow", markup=False)
    console.print("Written: " + ", ".join(map(str, written)), markup=False, soft_wrap=True)
    return log.rows
