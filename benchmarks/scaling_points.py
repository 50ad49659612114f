"""What `python -m benchmarks scaling` fits: the rows of `quality` by family, and of `million` by position."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.log import read, readable
from benchmarks.million_rows import MillionRow
from benchmarks.rows import Row
from benchmarks.scaling_fit import LEAST_X
from kvcompress.fits import Shape, family_of, x_of
from kvcompress.models import FOLDER
from kvcompress.spec import CacheSpec
from kvcompress.tracing import load_config, read_layers, trace

Cell = tuple[float, int]  # x and context


@dataclass(frozen=True)
class Measured:
    """The rows of a `quality` run with what they share. model: None for the embedded one."""

    rows: list[Row]
    model: str | None
    text: str
    commits: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> Measured:
        """Raises OSError where there is no such file, ValueError where nothing was measured."""
        lines = readable(path.read_text("utf-8").splitlines())
        if not lines:
            raise ValueError(f"{path} holds no rows")
        settings: Mapping[str, Any] = lines[-1].get("settings", {})
        commits = tuple(sorted({str(line.get("commit")) for line in lines}))
        text = settings.get("text") or "library modules"
        return cls(read(path, Row), settings.get("model"), str(text), commits)

    def shape(self) -> Shape:
        """The model's, from its config; the heads of its first compressed layer."""
        import torch

        config = load_config(FOLDER if self.model is None else self.model)
        model, cache = trace(config, torch.float32)
        layers, _ = read_layers(cache, config)
        full = next((layer for layer in layers if layer.compressed), None)
        if full is None:
            raise ValueError(f"{config.model_type} has no layer that is compressed")
        return Shape(sum(p.numel() for p in model.parameters()), len(layers), full.heads, full.dims)


@dataclass(frozen=True)
class Points:
    """A family's measurements, the same cells in every seed.

    losses, ratios [seeds, cells]: KL in nats, ln of the perplexity over the uncompressed cache's of the same seed and
    context. caches: their names; specs: as written.
    """

    kind: str
    cells: list[Cell]
    losses: np.ndarray
    ratios: np.ndarray
    seeds: tuple[int, ...]
    caches: tuple[str, ...]
    specs: tuple[CacheSpec, ...]

    @property
    def x(self) -> np.ndarray:
        return np.array([x for x, _ in self.cells])

    @property
    def contexts(self) -> np.ndarray:
        return np.array([context for _, context in self.cells])


def parse(content: Mapping[str, Any]) -> CacheSpec:
    return CacheSpec.from_json(json.dumps(content))


def families(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Measured rows by the family that `kvcompress.fits.family_of` says, or by cache where it says none."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.status == "ok" and row.kl_mean is not None and row.bits_per_element is not None:
            known = None if row.spec is None else family_of(parse(row.spec))
            found.setdefault(row.cache if known is None else known[0], []).append(row)
    return found


def points(rows: Sequence[Row], references: Mapping[tuple[int, int], float], shape: Shape) -> Points:
    """A family's rows as points; references: the uncompressed cache's perplexity by (context, seed).

    Raises ValueError, saying why, where no line can be put through them.
    """
    parsed = [None if row.spec is None else parse(row.spec) for row in rows]
    kinds = [None if spec is None else family_of(spec) for spec in parsed]
    if kinds[0] is None:
        raise ValueError("one number does not say what it is: its codecs differ, or it is no spec of this package")
    settings = {(spec.sinks, spec.window, spec.basis) for spec in parsed if spec is not None}
    if len(settings) > 1:
        raise ValueError(f"measured with different sinks, windows or bases: {sorted(settings)}")
    kind = kinds[0][1]
    values: dict[Cell, dict[int, tuple[float, float]]] = {}
    for row, spec in zip(rows, parsed, strict=True):
        base = references.get((row.context, row.seed))
        if spec is not None and base is not None and row.perplexity is not None and row.kl_mean is not None:
            cell = x_of(spec, kind, shape), row.context
            values.setdefault(cell, {})[row.seed] = row.kl_mean, math.log(row.perplexity / base)
    seeds = sorted({seed for own in values.values() for seed in own})
    cells = sorted(cell for cell, own in values.items() if len(own) == len(seeds))
    distinct = len({x for x, _ in cells})
    if distinct < LEAST_X:
        raise ValueError(f"{distinct} values of {kind} in every seed: {LEAST_X} or more are needed for a line")
    table = np.array([[values[cell][seed] for cell in cells] for seed in seeds])
    if (table[..., 0] <= 0).any():
        raise ValueError("its KL is 0 to within rounding: there is no logarithm to fit")
    specs = {str(spec): spec for spec in parsed if spec is not None}
    names = tuple(dict.fromkeys(row.cache for row in rows))
    return Points(kind, cells, table[..., 0], table[..., 1], tuple(seeds), names, tuple(specs.values()))


def positions(path: Path) -> tuple[list[MillionRow], str | None]:
    """The rows of `million` with increases by position, and the model's name (None: the marathon model)."""
    lines = readable(path.read_text("utf-8").splitlines())
    rows = [row for row in read(path, MillionRow) if row.restart is None and row.increase_by_bucket]
    return rows, lines[-1].get("settings", {}).get("model") if lines else None
