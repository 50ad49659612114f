"""The job `python -m benchmarks memory`: measured bytes of every cache against the context, for models' geometries.

See `memory_fill` for what is filled and counted, `memory_rows` for what a row says of how it is known. Where the whole
uncompressed cache fits the budget all layers are filled; beyond, a layer of each kind is filled alone and counted as
often as the model has it. Layers of the same sizes and codecs hold the same bytes, so one is filled for all geometries
that have it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID

from benchmarks import memory_geometries, memory_plot, memory_tables
from benchmarks.caches import UNCOMPRESSED, Contender, compressed, quantized
from benchmarks.frontier_subjects import DATA
from benchmarks.log import Log, open_log
from benchmarks.memory_fill import Fill, Level, Stop, measured
from benchmarks.memory_geometries import Geometry, Kind, layer_kinds
from benchmarks.memory_rows import (
    SLOPE,
    LayerBytes,
    Row,
    empty_row,
    fits,
    known_levels,
    layered_row,
    part_of,
    whole_row,
)
from benchmarks.progress import bar
from benchmarks.results import first_line
from kvcompress.planning import GIB, parse_size
from kvcompress.spec import DEFAULT_SPEC

SPECS = ("fp8", "trellis3", "spectral3", DEFAULT_SPEC, "prerope+spectral2", "kivi2", "kivi4")
CONTEXTS = tuple(2**power for power in range(10, 21))


@dataclass(frozen=True)
class Settings:
    """What to measure. contexts, chunk in tokens; budget, gpu, reserve in bytes; minutes: of one fill.

    budget: uncompressed keys and values that a fill may hold, as a whole cache or in a layer of a cache that keeps or
    decodes all of them. gpu, reserve, weight_bits: of the device that tokens are to fit on, and a parameter there.
    """

    geometries: tuple[str, ...] = tuple(memory_geometries.names())
    specs: tuple[str, ...] = SPECS
    baselines: bool = True
    contexts: tuple[int, ...] = CONTEXTS
    chunk: int = 4096
    budget: int = GIB
    minutes: float = 2.0
    gpu: int = parse_size("80GB")
    reserve: int = 2 * GIB
    weight_bits: float = 16.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.geometries:
            raise ValueError(f"no geometry is named; known: {', '.join(memory_geometries.names())}")
        if not self.contexts or min(self.contexts) < 2 or list(self.contexts) != sorted(set(self.contexts)):
            raise ValueError(f"contexts must be tokens, 2 or more, each once and ascending, got {self.contexts}")
        if self.chunk < 1 or self.seed < 0:
            raise ValueError(f"chunk must be at least 1 and seed at least 0, got {self.chunk} and {self.seed}")
        for name in ("minutes", "weight_bits"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    def contenders(self) -> list[Contender]:
        """The caches; raises ValueError for a spec that is none."""
        stock = [quantized("quanto", bits) for bits in (4, 2)] if self.baselines else []
        return [UNCOMPRESSED, *map(compressed, self.specs), *stock]

    @cached_property
    def figures(self) -> Path | None:
        """The file of real spectra, None where this machine does not have it."""
        path = DATA / "spectra" / "kv_spectra.json"
        return path if path.exists() else None

    def of_rows(self) -> dict[str, Any]:
        """What a row depends on beside its key."""
        figures = self.figures and self.figures.name
        return {"chunk": self.chunk, "budget": self.budget, "seed": self.seed, "spectra": figures}


class Run:
    """A run under way: the log that it writes, the levels of layers that are known, and why fills of this run ended."""

    def __init__(self, settings: Settings, log: Log[Row], progress: Progress):
        self.settings, self.log, self.progress = settings, log, progress
        self._rows = {row.key: row for row in log.rows}
        self._levels = known_levels(log.rows)
        self._stops: dict[str, Stop] = {}

    def cache(self, geometry: Geometry, contender: Contender) -> None:
        """All missing rows of a cache of one model."""
        wanted = [row for row in self._empty(geometry, contender) if not self._done(row)]
        if not wanted:
            return
        if contender.missing is not None:
            self._add(*(replace(row, status=contender.lack, reason=contender.missing) for row in wanted))
            return
        try:
            kinds = layer_kinds(geometry, contender)
        except ValueError as error:
            self._add(*(replace(row, status="not supported", reason=first_line(error)) for row in wanted))
            return
        self._whole(geometry, contender, wanted)
        rest = [row for row in wanted if not self._done(row) and self._rows.get(row.key, row).status != "failed"]
        for kind in kinds if rest else ():
            for _ in self._levels_of(geometry, contender, kind, [row.tokens for row in rest]):
                self._add(*(self._layered(row, kinds) for row in rest if self._complete(row, kinds)))
        self._add(*(self._layered(row, kinds) for row in rest if not self._done(row)))

    def _empty(self, geometry: Geometry, contender: Contender) -> list[Row]:
        return [empty_row(geometry, contender, tokens) for tokens in self.settings.contexts]

    def _done(self, row: Row) -> bool:
        """Whether a row is there; a slope is measured anew where there is more time for it now."""
        old = self._rows.get(row.key)
        if old is None or old.status != "ok":
            return False
        return old.basis != SLOPE or (old.minutes or 0) >= self.settings.minutes

    def _add(self, *rows: Row) -> None:
        for row in rows:
            self._rows[row.key] = row
            self.log.add(row)

    def _complete(self, row: Row, kinds: Sequence[Kind]) -> bool:
        """Whether a row that is not there yet can be put together without a slope."""
        return not self._done(row) and all(row.tokens in self._levels.get(kind.label, {}) for kind in kinds)

    def _whole(self, geometry: Geometry, contender: Contender, wanted: Sequence[Row]) -> None:
        """Those rows that the budget has room for as a whole; what the time ends is left for layer by layer."""
        waiting = {row.tokens: row for row in wanted if (row.uncompressed_bytes or 0) <= self.settings.budget}
        if not waiting:
            return
        for found in self._measure(geometry, contender, tuple(range(geometry.layers)), tuple(waiting)):
            if isinstance(found, Level):
                self._add(whole_row(waiting.pop(found.tokens), found))
            elif found.status == "failed":
                self._add(*(replace(row, status="failed", reason=found.reason) for row in waiting.values()))

    def _levels_of(
        self, geometry: Geometry, contender: Contender, kind: Kind, wanted: Sequence[int]
    ) -> Iterator[Level]:
        """Fill a layer of a kind, unless all that is to be known of it is, or a fill of this run ended before."""
        levels = self._levels.setdefault(kind.label, {})
        room = self.settings.budget if kind.dense else float("inf")
        contexts = tuple(n for n in self.settings.contexts if n <= max(wanted) and geometry.uncompressed(1, n) <= room)
        known = all(n in levels or (n not in contexts and part_of(kind, levels, n)) for n in wanted)
        if known or kind.label in self._stops or not contexts:
            return
        for found in self._measure(geometry, contender, kind.layers[:1], contexts):
            if isinstance(found, Stop):
                self._stops[kind.label] = found
            else:
                levels[found.tokens] = found
                yield found

    def _measure(
        self, geometry: Geometry, contender: Contender, layers: tuple[int, ...], contexts: tuple[int, ...]
    ) -> Iterator[Level | Stop]:
        settings = self.settings
        seconds = 60 * settings.minutes
        fill = Fill(
            geometry.name, contender.name, layers, contexts, settings.chunk, seconds, settings.seed, settings.figures
        )
        what = f"{geometry.name}: {contender.name}, {'a layer' if len(layers) == 1 else f'{len(layers)} layers'}"
        task: TaskID = self.progress.add_task(what, total=contexts[-1])
        for found in measured(fill):
            if isinstance(found, int):
                self.progress.update(task, completed=found)
            else:
                yield found
        self.progress.remove_task(task)

    def _layered(self, row: Row, kinds: Sequence[Kind]) -> Row:
        parts = [part_of(kind, self._levels[kind.label], row.tokens) for kind in kinds]
        stops = [self._stops[kind.label] for kind in kinds if kind.label in self._stops]
        broken = next((stop for stop in stops if stop.status == "failed"), None)
        known = [part for part in parts if part is not None]
        if broken is not None and any(part is None or part.slope for part in parts):
            return replace(row, status=broken.status, reason=broken.reason)
        if len(known) < len(parts):
            reason = stops[0].reason if stops else "the budget has no room for two contexts of a layer"
            return replace(row, status="not measured", reason=reason)
        return replace(layered_row(row, known, self.settings.minutes), reason=_why(known, stops))


def _why(parts: Sequence[LayerBytes], stops: Sequence[Stop]) -> str | None:
    """Why a row is on a slope; None where it is not."""
    if not any(part.slope for part in parts):
        return None
    return stops[0].reason if stops else "one layer's uncompressed keys and values are more than the budget"


def save(folder: Path, rows: Sequence[Row], settings: Settings) -> list[Path]:
    """Write table.md, fits.json and memory.png into the folder; returns their paths."""
    table, fitting, picture = (folder / name for name in ("table.md", "fits.json", "memory.png"))
    found = fits(rows, settings.gpu, settings.reserve, settings.weight_bits)
    device = {name: getattr(settings, name) for name in ("gpu", "reserve", "weight_bits")}
    fitting.write_text(json.dumps({**device, "fits": [asdict(each) for each in found]}, indent=1) + "\n")
    table.write_text(memory_tables.document(rows, found, settings.gpu, settings.reserve, settings.weight_bits))
    memory_plot.plot(picture, rows, found)
    return [table, fitting, picture]


def run(settings: Settings, output: Path, console: Console, fresh: bool = False) -> list[Row]:
    """Measure what is not measured yet, and write everything that the folder `output` then holds.

    fresh: forget the rows that it holds. Raises ValueError for settings, specs or geometries that make no sense, or
    that disagree with the rows in the folder; OSError for a geometry that is not there.
    """
    contenders = settings.contenders()  # a wrong spec or geometry is told before anything is measured
    geometries = [memory_geometries.load(name) for name in settings.geometries]
    log = open_log(output, "memory", Row, settings.of_rows(), fresh)
    with bar(console, 60) as progress:
        job = Run(settings, log, progress)
        total = progress.add_task("all", total=len(geometries) * len(contenders))
        for geometry in geometries:
            for contender in contenders:
                job.cache(geometry, contender)
                progress.advance(total)
    log.rewrite()
    written = [log.path, *save(output, log.rows, settings)]
    console.print("Written: " + ", ".join(map(str, written)), markup=False, soft_wrap=True)
    return log.rows
