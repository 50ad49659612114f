"""The job `python -m benchmarks retrieval`: what can still be found in a long text, by task, length, depth and cache.

See `haystack` for the tasks. Every cache reads the same documents in the same chunks, so that everything but the last
chunk is attended through the cache; an answer counts when greedy decoding gives it word for word (`needles.right`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import haystack, retrieval_plot, retrieval_tables, subjects, texts
from benchmarks.caches import UNCOMPRESSED, Contender, compressed, quantized_caches
from benchmarks.frontier_subjects import DATA, WINDOW, chunk_of, default_text
from benchmarks.haystack import TASKS, Shape
from benchmarks.log import Log, open_log
from benchmarks.needles import Document, right
from benchmarks.progress import bar
from benchmarks.quality import Advance, predict
from benchmarks.results import failed
from benchmarks.retrieval_rows import Row, empty_row
from benchmarks.storage import footprint
from kvcompress import CompressedCache
from kvcompress.store import PAGE

#: What is measured unless other specs are named: ours at several rates, and the peers that a reader will ask for.
SPECS = (
    "prerope+spectral4",
    "prerope+spectral3",
    "prerope+spectral2",
    "trellis3",
    "trellis2",
    "turboquant3",
    "turboquant2",
    "kivi2",
)


@dataclass(frozen=True)
class Settings:
    """What to measure. Lengths and chunk in tokens; depths and seeds: how many; the rest as in `haystack.Shape`."""

    tasks: tuple[str, ...] = tuple(TASKS)
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    depths: int = 5
    specs: tuple[str, ...] = SPECS
    baselines: bool = True
    model: str | None = None
    load_in_4bit: bool = False
    text: Path | None = None
    seeds: int = 3
    chunk: int = 512
    keys: int = Shape.keys
    values: int = Shape.values
    hops: int = Shape.hops

    def __post_init__(self) -> None:
        unknown = [name for name in self.tasks if name not in TASKS]
        if unknown or not self.tasks:
            raise ValueError(f"unknown task {(unknown or [''])[0]!r}; known: {', '.join(TASKS)}")
        if not self.lengths or min(self.lengths) < texts.SHORTEST:
            raise ValueError(f"lengths must be at least {texts.SHORTEST} tokens each, got {self.lengths}")
        for name in ("depths", "seeds", "chunk", "keys", "values", "hops"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def grid(self) -> tuple[float, ...]:
        """The depths, in even steps from 0 to 1; the middle alone where there is one."""
        return tuple(index / (self.depths - 1) for index in range(self.depths)) if self.depths > 1 else (0.5,)

    def of_rows(self, text: Path | None) -> dict[str, Any]:
        """What a row depends on beside its key; text None: the held-out modules."""
        names = ("model", "load_in_4bit", "chunk", "keys", "values", "hops")
        return {"text": text and text.name, **{name: getattr(self, name) for name in names}}

    @property
    def contenders(self) -> list[Contender]:
        """Those that need an uncompressed cache to count by come first, so that it can go before the others begin."""
        return [UNCOMPRESSED, *(quantized_caches() if self.baselines else []), *map(compressed, self.specs)]


@dataclass(frozen=True)
class Case:
    """A document, and what says in the rows which one it is."""

    document: Document
    task: str
    tokens: int
    depth: float | None
    seed: int
    chunk: int


def cases(tokenizer: PreTrainedTokenizerBase, text: texts.Text, settings: Settings) -> list[Case]:
    """All documents, the short ones first; raises ValueError where one has no room for what it is to hold."""
    found = []
    for tokens in settings.lengths:
        chunk = chunk_of(settings.chunk, tokens)
        gap = chunk + WINDOW + PAGE  # a window is up to a page longer before its oldest tokens are coded
        for task in settings.tasks:
            for depth in settings.grid if TASKS[task].deep else (None,):
                shape = Shape(tokens, 0.5 if depth is None else depth, settings.keys, settings.values, settings.hops)
                for seed in range(settings.seeds):
                    document = haystack.document(task, tokenizer, text, shape, gap, seed)
                    found.append(Case(document, task, tokens, depth, seed, chunk))
    return found


class Reader:
    """A model that reads documents through caches.

    reference: an uncompressed cache of the document at hand, by which other libraries' caches count their elements.
    """

    def __init__(self, model: PreTrainedModel, advance: Advance):
        self.model, self.advance = model, advance
        self.reference: Cache | None = None

    def row(self, case: Case, contender: Contender, row: Row) -> Row:
        """The row with all that was measured; raises whatever the cache raises."""
        document = case.document
        said = predict(self.model, contender, document.ids, document.positions, case.chunk, self.advance)
        size = footprint(said.cache, self._counted(case, contender, said.cache))
        answers = right(document, said)
        return replace(row, **size.fields(), recall=sum(answers) / len(answers), questions=len(answers))

    def _counted(self, case: Case, contender: Contender, cache: Cache) -> Cache:
        """What the cache's elements are counted by: the reference, or itself where it tells them."""
        if isinstance(cache, CompressedCache):
            return cache
        if contender is UNCOMPRESSED:
            self.reference = cache
        elif self.reference is None:  # measured by a run that was killed since
            nowhere = torch.tensor([], dtype=torch.int64)
            self.reference = predict(
                self.model, UNCOMPRESSED, case.document.ids, nowhere, case.chunk, lambda tokens: None
            ).cache
        return self.reference


def filled(reader: Reader, case: Case, contender: Contender, row: Row) -> Row:
    """The row of a cache, whatever happens: measured, or with a status and a reason."""
    if contender.missing is not None:
        return replace(row, status=contender.lack, reason=contender.missing)
    try:
        return reader.row(case, contender, row)
    except Exception as error:  # a cache that breaks is a result to show
        return failed(row, error)


def measure(
    model: PreTrainedModel, found: Sequence[Case], chosen: Sequence[Contender], log: Log[Row], console: Console
) -> None:
    """Add all missing rows to the log."""
    with bar(console, 48) as progress:
        task = progress.add_task("documents", total=sum(case.tokens for case in found) * len(chosen))
        reader = Reader(model, lambda tokens: progress.advance(task, tokens))
        done = 0
        for case in found:
            for contender in chosen:
                if contender is UNCOMPRESSED or contender.spec is not None:
                    reader.reference = None  # the last document's; and ours must not have to fit beside this one's
                row = empty_row(case.task, case.tokens, case.depth, case.seed, contender)
                progress.update(task, description=f"{case.task} {case.tokens} seed {case.seed}: {contender.name}")
                if not log.done(row.key):
                    log.add(filled(reader, case, contender, row))
                done += case.tokens
                progress.update(task, completed=done)


def save(folder: Path, rows: Sequence[Row], title: str, remarks: Sequence[str]) -> list[Path]:
    """Write table.md and, where the needle was measured, heatmaps.png into the folder; returns their paths."""
    table, picture = folder / "table.md", folder / "heatmaps.png"
    table.write_text(retrieval_tables.document(rows, title, remarks))
    return [table, *([picture] if retrieval_plot.plot(picture, rows, title) else [])]


def run(settings: Settings, output: Path, console: Console, fresh: bool = False, data: Path = DATA) -> list[Row]:
    """Measure what is not measured yet, and write everything that the folder `output` then holds.

    fresh: forget the rows that it holds. Raises ValueError for settings or specs that make no sense, or that disagree
    with the rows in the folder; OSError for a model or text that is not there.
    """
    chosen = settings.contenders  # a wrong spec is told before anything is loaded
    path = settings.text or default_text(data)
    options = {**asdict(settings), "text": settings.text and str(settings.text)}
    log = open_log(output, "retrieval", Row, settings.of_rows(path), fresh, options=options)
    model, tokenizer = subjects.load(settings.model, settings.load_in_4bit)
    text = texts.load(tokenizer, path, seed=0)
    measure(model, cases(tokenizer, text, settings), chosen, log, console)
    log.rewrite()
    remarks = [f"The haystack is {text.name if path is None else path.name}."]
    if len(log.commits) > 1:
        remarks.append(f"The rows come from {len(log.commits)} states of the code: {', '.join(log.commits)}.")
    written = [log.path, *save(output, log.rows, settings.model or "embedded model", remarks)]
    console.print((output / "table.md").read_text(), markup=False)
    console.print("Written: " + ", ".join(map(str, written)), markup=False, soft_wrap=True)
    return log.rows
