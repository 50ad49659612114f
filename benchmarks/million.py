"""The job `python -m benchmarks million`: perplexity and recall over one document of up to a million tokens.

The document is text with facts at even depths and, at its end, a question for each (benchmarks/needles.py). Every token
before the questions is scored, in buckets of powers of two of its position, and compared with the uncompressed cache on
the same tokens. A second row of the uncompressed cache starts anew every RESTART tokens, which shows what longer
contexts are worth, or cost, on this text.

Attention is ours in all rows, since transformers' own would make a mask of chunk x context for every chunk.
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import million_plot, million_tables, needles, subjects, texts
from benchmarks.caches import UNCOMPRESSED, Contender, compressed
from benchmarks.embedded.corpus import standard_library
from benchmarks.frontier_subjects import DATA, default_text
from benchmarks.log import Log, open_log
from benchmarks.marathon import model as marathon
from benchmarks.million_reading import Checkpoint, Reading, read
from benchmarks.million_rows import MillionRow
from benchmarks.needles import Document
from benchmarks.options import at_least
from benchmarks.progress import bar
from benchmarks.recall import draw_facts
from benchmarks.results import failed
from benchmarks.storage import cache_bytes, count
from kvcompress import CompressedCache
from kvcompress.attention import NAME

SPECS = ("spectral4", "spectral3", "spectral2", "trellis3", "turboquant3", "lowrank32+trellis4")
RESTART = 16_384
FIRST = 1024  # the first bucket's end
DEPTHS = 8  # parts of the document that recall is told for
SCRATCH = "scratch"  # of the output folder: checkpoints, and the losses that others are compared with
GAP = 2048  # tokens of text between the last fact and the first question


@dataclass(frozen=True)
class Settings:
    """specs: beside the uncompressed cache. tokens, chunk: of the document, and fed at a time. model: None for the
    marathon model. text: None for War and Peace, where it is, and the held-out library modules after it.
    """

    specs: tuple[str, ...] = SPECS
    tokens: int = 1 << 20
    chunk: int = 4096
    facts: int = 64
    seed: int = 0
    model: str | None = None
    load_in_4bit: bool = False
    text: Path | None = None

    def __post_init__(self) -> None:
        at_least(self, tokens=2 * FIRST, chunk=1, facts=0)
        if self.tokens > RESTART and self.tokens % RESTART:
            raise ValueError(f"tokens must be a multiple of {RESTART:,} where they are more, got {self.tokens:,}")

    def of_rows(self, text: str) -> dict[str, object]:
        """What a row depends on beside its key."""
        return {"model": self.model, "text": text, "chunk": self.chunk, "facts": self.facts}


def contenders(specs: Sequence[str]) -> list[Contender]:
    """The uncompressed cache under our attention, then `specs`; raises ValueError for a wrong one."""
    return [replace(UNCOMPRESSED, attention=NAME), *map(compressed, specs)]


def document(settings: Settings, tokenizer: PreTrainedTokenizerBase, data: Path) -> tuple[Document, int, str]:
    """(the document, where its questions begin, its text's name); raises ValueError where the text is too short."""
    book = default_text(data) if settings.text is None else settings.text
    text = texts.load(tokenizer, book, settings.seed)
    if settings.text is None and book is not None and len(text.ids) < settings.tokens:
        code = texts.encode(tokenizer, "\n".join(standard_library(held_out=True)))
        text = replace(text, ids=torch.cat([text.ids, code]), name=f"{book.name}, then held-out library modules")
    rng = random.Random(settings.seed)
    facts = draw_facts(rng, settings.facts, distinct=True)
    filler = text.windows(1, settings.tokens, first=0.0)[0]
    gap = min(GAP, settings.tokens // 8)
    found = needles.build(tokenizer, filler, facts, facts, gap)
    questions = found.ids.shape[1]
    if facts:
        questions = found.answers[0].start - len(needles.question_and_answer(tokenizer, facts[0])[0])
    return found, questions, Path(text.name).name


def buckets(tokens: int) -> list[range]:
    """Positions 1 to FIRST - 1, FIRST to 2 FIRST - 1 and so on, up to `tokens` - 1."""
    ends = [FIRST]
    while ends[-1] < tokens:
        ends.append(2 * ends[-1])
    return [range(1 if end == FIRST else end // 2, min(end, tokens)) for end in ends]


def filled(row: MillionRow, reading: Reading, found: Document, questions: int, base: np.ndarray | None) -> MillionRow:
    """The row with what was read. base: the uncompressed cache's losses."""
    scored = reading.loss[: questions - 1]
    parts = {str(part.stop): slice(part.start - 1, part.stop - 1) for part in buckets(questions)}
    increase = None
    if base is not None:
        increase = {name: _increase(scored[part] - base[: questions - 1][part]) for name, part in parts.items()}
    hits = [bool(reading.right[answer.start - 1 : answer.stop - 1].all()) for answer in found.answers]
    depths = [list(part) for part in np.array_split(np.array(hits), min(DEPTHS, len(hits)))] if hits else []
    sizes = _sizes(reading.cache)
    return replace(
        row,
        **sizes,
        peak_bytes=reading.peak or None,
        scored=len(scored),
        perplexity=math.exp(float(scored.mean(dtype=np.float64))),
        perplexity_by_bucket={
            name: math.exp(float(scored[part].mean(dtype=np.float64))) for name, part in parts.items()
        },
        increase_by_bucket=increase,
        recall=float(np.mean(hits)) if hits else None,
        recall_by_depth=[float(np.mean(part)) for part in depths] or None,
        questions=len(hits) or None,
        seconds=reading.seconds,
    )


def _sizes(cache: Cache) -> dict[str, Any]:
    """Measured bytes of a cache, and what its keys and values would take in bfloat16."""
    if isinstance(cache, CompressedCache):
        report = cache.memory()
        return {
            "cache_bytes": report.total,
            "bfloat16_bytes": 2 * report.elements,
            "bits_per_element": report.bits_per_element if report.coded_elements else None,
            "effective_bits_per_element": report.effective_bits_per_element,
        }
    held = [[layer.keys, layer.values] for layer in cache.layers]  # type: ignore[union-attr]
    return {
        "cache_bytes": cache_bytes(cache),
        "bfloat16_bytes": 2 * count(held),
        "effective_bits_per_element": 8 * cache_bytes(cache) / count(held),
    }


def _increase(more: np.ndarray) -> tuple[float, float]:
    """(per cent by which perplexity grows, its standard error), of the losses' differences token by token."""
    mean, error = float(more.mean(dtype=np.float64)), float(more.std(dtype=np.float64)) / math.sqrt(len(more))
    return 100 * math.expm1(mean), 100 * math.exp(mean) * error


@dataclass(frozen=True)
class Run:
    """A run under way: its document, the log that it writes, and how it shows where it is."""

    settings: Settings
    model: PreTrainedModel
    found: Document
    questions: int
    log: Log[MillionRow]
    folder: Path
    progress: Progress

    def base(self) -> np.ndarray | None:
        """The uncompressed cache's losses, which its run has left in the folder."""
        return np.load(self._losses) if self._losses.exists() else None

    @property
    def _losses(self) -> Path:
        return self.folder / SCRATCH / f"uncompressed-{self.settings.tokens}-{self.settings.seed}.npy"

    def measure(self, contender: Contender, restart: int | None) -> None:
        """Add the row of one cache, unless the log has it; a failure is a row too."""
        row = MillionRow(contender.name, contender.content, self.settings.tokens, self.settings.seed, restart)
        is_base = contender.spec is None and restart is None
        if self.log.done(row.key) and not (is_base and self.base() is None):
            return
        task = self.progress.add_task(row.name, total=self.settings.tokens)
        checkpoint = Checkpoint(self.folder / SCRATCH, f"{row.name} {row.tokens} {row.seed}")

        def advance(tokens: int) -> None:
            self.progress.advance(task, tokens)

        try:
            with contender.attending(self.model):
                reading = read(self.model, contender, self.found.ids, self.settings.chunk, checkpoint, advance, restart)
            if is_base:
                self._losses.parent.mkdir(exist_ok=True)
                np.save(self._losses, reading.loss)
            row = filled(row, reading, self.found, self.questions, None if is_base else self.base())
            checkpoint.remove()
        except (RuntimeError, ValueError, OSError) as error:
            row = failed(row, error)
        self.log.add(row)


def run(settings: Settings, output: Path, console: Console, fresh: bool = False, data: Path = DATA) -> list[MillionRow]:
    """Measure what is not measured yet, and write table.md and million.png; a killed run goes on where it was.

    Raises ValueError for settings or specs that make no sense or disagree with the folder's rows, OSError for a model
    or text that is not there.
    """
    chosen = contenders(settings.specs)
    loaded = subjects.load(settings.model, settings.load_in_4bit) if settings.model else marathon.load()
    model, tokenizer = loaded
    found, questions, text = document(settings, tokenizer, data)
    options = {**asdict(settings), "text": settings.text and str(settings.text)}
    log = open_log(output, "million", MillionRow, settings.of_rows(text), fresh, options=options)
    if fresh:
        shutil.rmtree(output / SCRATCH, ignore_errors=True)
    with bar(console, 40) as progress:
        job = Run(settings, model, found, questions, log, output, progress)
        job.measure(chosen[0], None)
        if settings.tokens > RESTART:
            job.measure(chosen[0], RESTART)
        for contender in chosen[1:]:
            job.measure(contender, None)
    log.rewrite()
    picture, table = output / "million.png", output / "table.md"
    million_plot.plot(picture, log.rows)
    table.write_text(million_tables.document(log.rows))
    console.print(table.read_text(), markup=False)
    console.print(f"Written: {log.path}, {table}, {picture}", markup=False, soft_wrap=True)
    return log.rows
