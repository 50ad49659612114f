"""The job `python -m benchmarks prefix`: how soon a prompt is answered whose beginning is stored.

One prompt is read and put into a store; others begin as it did and ask something else. Their time to first token is
measured in turns without the store, with the entry in memory, and with a store that has just been opened and has it on
disk only, where the file is first dropped from the system's memory. What the store finds is cut where the prompts part.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import prefix_plot, prefix_rows, subjects, texts
from benchmarks.caches import UNCOMPRESSED, Contender, compressed
from benchmarks.device import release, settle
from benchmarks.log import open_log
from benchmarks.options import at_least
from benchmarks.prefix_rows import WAYS, Row, empty_row
from benchmarks.progress import bar
from benchmarks.results import failed
from benchmarks.storage import cache_bytes
from benchmarks.timing import reading
from kvcompress import CacheSpec, CompressedCache, PrefixStore
from kvcompress.fingerprint import fingerprint
from kvcompress.store import PAGE

SPECS = ("exact", "trellis3", "spectral3", "prerope+spectral3")
BUDGET = "1TiB"  # of the stores: nothing is evicted


@dataclass(frozen=True)
class Settings:
    """What to measure. contexts: tokens that prompts have in common; question: tokens of each prompt's own.

    chunk: tokens of a prompt fed at a time; text: a file, None for library modules that training never saw.
    """

    model: str | None = None
    load_in_4bit: bool = False
    text: Path | None = None
    contexts: tuple[int, ...] = (1024, 4096)
    specs: tuple[str, ...] = SPECS
    question: int = 64
    repetitions: int = 5
    chunk: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.contexts or min(self.contexts) < PAGE:
            raise ValueError(f"contexts must be one or more numbers of at least {PAGE}, got {self.contexts}")
        at_least(self, question=2, repetitions=1, chunk=1, seed=0)

    def of_rows(self) -> dict[str, object]:
        """What a row depends on beside its context and cache."""
        names = ("model", "load_in_4bit", "text", "question", "repetitions", "chunk", "seed")
        return {name: value for name, value in self.options().items() if name in names}

    def options(self) -> dict[str, object]:
        """All of them, as JSON holds them."""
        return {**asdict(self), "text": None if self.text is None else str(self.text)}


@dataclass(frozen=True)
class Case:
    """Prompts [1, context + question] that begin alike, and who reads them. The first is stored, and warms up."""

    model: PreTrainedModel
    weights: str
    prompts: tuple[Tensor, ...]
    context: int
    settings: Settings

    @classmethod
    def of(cls, model: PreTrainedModel, weights: str, text: texts.Text, context: int, settings: Settings) -> Case:
        (shared,) = text.windows(1, context)
        questions = text.windows(settings.repetitions + 1, settings.question + len(text.prefix), first=0.25)
        prompts = [torch.cat([shared, own[:, len(text.prefix) :]], dim=1) for own in questions]
        return cls(model, weights, tuple(ids.to(model.device) for ids in prompts), context, settings)

    def measured(self, row: Row, contender: Contender, folder: Path) -> Row:
        """The row with what the cache took; folder: for the store."""
        first = contender.make(self.model.config)
        reading(self.model, contender, first, self.prompts[0], self.settings.chunk)
        if not isinstance(first, CompressedCache):
            row = replace(row, uncompressed_bytes=cache_bytes(first))
            return row.timed({"without": [self._read(contender, ids)[0] for ids in self.prompts[1:]]})
        store = PrefixStore(folder, memory_budget=BUDGET, disk_budget=BUDGET, min_tokens=PAGE)
        store.put(self.weights, first.spec, self.prompts[0], first)
        store.flush()
        stats, memory = store.stats(), first.memory()
        row = replace(
            row,
            memory_bytes=stats["bytes: memory"],
            disk_bytes=stats["bytes: disk"],
            uncompressed_bytes=memory.uncompressed,
        )
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        reused, cold, same = 0, True, 0
        for ids in self.prompts[1:]:
            taken, wanted = self._read(contender, ids)
            seconds["without"].append(taken)
            taken, found, reused = self._look_up(contender, store, first.spec, ids)
            seconds["memory"].append(taken)
            cold &= dropped(folder)
            fresh = PrefixStore(folder, memory_budget=BUDGET, disk_budget=BUDGET, min_tokens=PAGE)
            taken, _, reused = self._look_up(contender, fresh, first.spec, ids)
            seconds["disk"].append(taken)
            same += bool((found == wanted).all())
        if not reused:
            reason = f"what its codecs learn takes more than the {self.context} tokens that the prompts share"
            return replace(row, status="not reusable", reason=reason).timed({"without": seconds["without"]})
        row = replace(row, tokens_reused=reused, disk_cold=cold, same_first_token=same / len(self.prompts[1:]))
        return row.timed(seconds)

    def _read(self, contender: Contender, ids: Tensor) -> tuple[float, Tensor]:
        """Seconds until the first token is known, and it, of a prompt that is read from its beginning."""
        return reading(self.model, contender, contender.make(self.model.config), ids, self.settings.chunk)

    def _look_up(
        self, contender: Contender, store: PrefixStore, spec: CacheSpec, ids: Tensor
    ) -> tuple[float, Tensor, int]:
        """As `_read`, with what a store has of the prompt; and how many tokens that were."""
        settle(self.model.device)
        begun = time.perf_counter()
        cache, tokens = store.lookup(self.weights, spec, ids, self.model.config, self.model.device)
        settle(self.model.device)
        looked = time.perf_counter() - begun
        begin = contender.make(self.model.config) if cache is None else cache
        seconds, token = reading(self.model, contender, begin, ids[:, tokens:], self.settings.chunk)
        return looked + seconds, token, tokens


def dropped(folder: Path) -> bool:
    """Ask the system to drop a folder's entries from its memory; whether it says that nothing of them is there."""
    if not hasattr(os, "posix_fadvise"):
        return False
    files = list(folder.glob("*.kvprefix"))
    for file in files:
        number = os.open(file, os.O_RDONLY)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)
    return not any(map(resident_pages, files))


def resident_pages(file: Path) -> int:
    """How many of a file's pages the system has in memory, which are mapped here for that and not read."""
    size = file.stat().st_size
    mapped = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
    found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    if ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(mapped.data_ptr()), ctypes.c_size_t(size), found):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return sum(page & 1 for page in found)


def save(folder: Path, rows: Sequence[Row], title: str) -> list[Path]:
    """Write table.md and first-token.png into the folder; returns their paths."""
    table, picture = folder / "table.md", folder / "first-token.png"
    table.write_text(prefix_rows.document(rows, title))
    prefix_plot.plot(picture, rows, title)
    return [table, picture]


def run(settings: Settings, output: Path, console: Console, fresh: bool = False) -> list[Row]:
    """Measure what is not measured yet, and write everything that the folder `output` then holds.

    fresh: forget the rows that it holds. Raises ValueError for settings or specs that make no sense, a text that is too
    short, or rows of other settings in the folder; OSError for a model or text that is not there.
    """
    contenders = [UNCOMPRESSED, *map(compressed, settings.specs)]  # a wrong spec is told before the model is loaded
    log = open_log(output, "prefix", Row, settings.of_rows(), fresh, options=settings.options())
    model, tokenizer = subjects.load(settings.model, settings.load_in_4bit)
    weights, text = fingerprint(model), texts.load(tokenizer, settings.text, settings.seed)
    with bar(console, 48) as progress:
        todo = [(context, each) for context in settings.contexts for each in contenders]
        task = progress.add_task("prefix", total=sum(context for context, _ in todo) * settings.repetitions)
        for context, contender in todo:
            row = empty_row(contender, context, settings.seed)
            progress.update(task, description=f"{context} tokens: {contender.name}")
            if not log.done(row.key):
                case = Case.of(model, weights, text, context, settings)
                with tempfile.TemporaryDirectory(prefix="store-", dir=output) as folder:
                    try:
                        row = case.measured(row, contender, Path(folder))
                    except Exception as error:  # a cache that breaks is a result to show
                        row = failed(row, error)
                log.add(row)
                release(model.device)
            progress.advance(task, context * settings.repetitions)
    log.rewrite()
    title = f"{subjects.described(settings.model, model)}; questions of {settings.question} tokens"
    written = [log.path, *save(output, log.rows, title)]
    console.print(prefix_rows.document(log.rows, title), markup=False)
    console.print("Written: " + ", ".join(map(str, written)), markup=False, soft_wrap=True)
    return log.rows
