"""The job `python -m benchmarks offload`: what a decode step costs when only some pages are on the device.

For every context and spec, caches of the same random tokens that differ in how many of their pages may be on the device
take steps in turns. On a GPU the other pages wait in pinned memory, on a CPU in a file, which the system may well keep
in its own memory: what is timed there is the reading, not the disk.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import offload_plot, offload_rows, subjects
from benchmarks.caches import Contender, compressed
from benchmarks.device import release, settle
from benchmarks.log import open_log
from benchmarks.offload_rows import RESIDENT, Row
from benchmarks.options import at_least
from benchmarks.progress import bar
from benchmarks.results import failed
from benchmarks.timing import START, WARM_UP, filled
from kvcompress import CompressedCache, Offload
from kvcompress.store import PAGE


@dataclass(frozen=True)
class Settings:
    """What to measure. budgets: percent of the bytes of coded pages, those that steps close included.

    folder: for the file, None for the system's own.
    """

    model: str | None = None
    load_in_4bit: bool = False
    contexts: tuple[int, ...] = (4096, 16384)
    specs: tuple[str, ...] = ("trellis3", "prerope+spectral3")
    budgets: tuple[int, ...] = (100, 50, 10, 0)
    steps: int = 20
    folder: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.contexts or min(self.contexts) <= START:
            raise ValueError(f"contexts must be one or more numbers above {START}, got {self.contexts}")
        if not self.budgets or not all(0 <= share <= 100 for share in self.budgets):
            raise ValueError(f"budgets must be one or more percentages from 0 to 100, got {self.budgets}")
        at_least(self, steps=1, seed=0)

    def of_rows(self) -> dict[str, object]:
        """What a row depends on beside its context, cache and budget."""
        return {name: value for name, value in self.options().items() if name not in ("contexts", "specs", "budgets")}

    def options(self) -> dict[str, object]:
        """All of them, as JSON holds them."""
        return {**asdict(self), "folder": None if self.folder is None else str(self.folder)}


def empty_rows(contender: Contender, context: int, settings: Settings) -> list[Row]:
    """The rows of a context and spec, not measured yet."""
    names = [RESIDENT, *(f"{share}%" for share in settings.budgets)]
    own = (settings.seed, contender.library, contender.content)
    return [Row(contender.name, context, name, *own) for name in names]


@torch.inference_mode()
def measured(model: PreTrainedModel, contender: Contender, rows: Sequence[Row], settings: Settings) -> list[Row]:
    """The rows of one context and spec with what their caches took."""
    caches = _caches(model, contender, rows, settings)
    seconds: list[list[float]] = [[] for _ in rows]
    peaks: list[int | None] = [None for _ in rows]
    last: list[Tensor] = []
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with contender.attending(model):
        for step in range(WARM_UP + settings.steps):
            last = []
            for index, cache in enumerate(caches):
                before = _begin_peak(model.device)
                begun = time.perf_counter()
                last.append(model(token, past_key_values=cache, use_cache=True).logits)
                settle(model.device)
                if step >= WARM_UP:
                    seconds[index].append(time.perf_counter() - begun)
                    peaks[index] = _peak(model.device, before, peaks[index])
    results = []
    for index, (row, cache) in enumerate(zip(rows, caches, strict=True)):
        held = cache.memory()
        row = replace(
            row, device_bytes=held.device, host_bytes=held.host, disk_bytes=held.disk, peak_bytes=peaks[index]
        )
        same = bool(torch.equal(last[index], last[0])) if index else None
        results.append(replace(row.timed(seconds[index], seconds[0]), same_logits=same))
    return results


def _caches(
    model: PreTrainedModel, contender: Contender, rows: Sequence[Row], settings: Settings
) -> list[CompressedCache]:
    """One for every row, of the same tokens, the first with all pages on the device."""
    first = filled(model, contender, rows[0].context, settings.seed)
    assert isinstance(first, CompressedCache)
    held = first.fork().memory()  # of one whose last layer has taken in what it was given
    coded = held.tokens * held.coded_elements / held.elements
    closed = -(-(WARM_UP + settings.steps) // PAGE) * PAGE  # tokens of the pages that the steps close at most
    pages = math.ceil((held.codes + held.scales) * (coded + closed) / coded) if coded else 0
    caches = [first]
    for share in settings.budgets:
        cache = first.fork()
        cache.keep_pages_in(Offload(pages * share // 100, folder=settings.folder))
        caches.append(cache)
    return caches


def _begin_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device, before: int, highest: int | None) -> int | None:
    if device.type != "cuda":
        return None
    return max(torch.cuda.max_memory_allocated(device) - before, highest or 0)


def save(folder: Path, rows: Sequence[Row], title: str) -> list[Path]:
    """Write table.md and steps.png into the folder; returns their paths."""
    table, picture = folder / "table.md", folder / "steps.png"
    table.write_text(offload_rows.document(rows, title))
    offload_plot.plot(picture, rows, title)
    return [table, picture]


def run(settings: Settings, output: Path, console: Console, fresh: bool = False) -> list[Row]:
    """Measure what is not measured yet, and write everything that the folder `output` then holds.

    fresh: forget the rows that it holds. Raises ValueError for settings or specs that make no sense, or rows of other
    settings in the folder; OSError for a model or folder that is not there.
    """
    contenders = [compressed(spec) for spec in settings.specs]  # a wrong spec is told before the model is loaded
    log = open_log(output, "offload", Row, settings.of_rows(), fresh, options=settings.options())
    model, _ = subjects.load(settings.model, settings.load_in_4bit)
    with bar(console, 48) as progress:
        todo = [(context, each) for context in settings.contexts for each in contenders]
        task = progress.add_task("offload", total=sum(context for context, _ in todo))
        for context, contender in todo:
            rows = empty_rows(contender, context, settings)
            progress.update(task, description=f"{context} tokens: {contender.name}")
            if not all(log.done(row.key) for row in rows):
                try:
                    rows = measured(model, contender, rows, settings)
                except Exception as error:  # a cache that breaks is a result to show
                    rows = [failed(row, error) for row in rows]
                for row in rows:
                    log.add(row)
                release(model.device)
            progress.advance(task, context)
    log.rewrite()
    title = subjects.described(settings.model, model)
    written = [log.path, *save(output, log.rows, title)]
    console.print(offload_rows.document(log.rows, title), markup=False)
    console.print("Written: " + ", ".join(map(str, written)), markup=False, soft_wrap=True)
    return log.rows
