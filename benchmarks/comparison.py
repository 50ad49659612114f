"""What got better and what got worse from one set of results to another, beyond noise.

Rows are matched by what they measure (see `measurements`), metrics by name (see `metrics`, which says how far each
moves by itself). A difference is the mean over the seeds that both sides have. It is noise up to the metric's own
bound, or, from three seeds on, up to three standard errors of the differences seed by seed and a fifth of that bound.
Where rows have quartiles, the sum of both half ranges is noise in any case.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks import metrics
from benchmarks.measurements import ABSENT, Identity, Line, Measurement, state
from benchmarks.metrics import Comparable, Metric

#: From how many seeds on the spread of their differences says how much noise there is.
SEEDS = 3


@dataclass(frozen=True)
class Change:
    """A metric of a measurement that moved by more than `noise`, or a row's status; values are means over seeds."""

    measurement: str
    metric: str
    old: float | str
    new: float | str
    noise: float = 0.0

    def __str__(self) -> str:
        if isinstance(self.old, str) or isinstance(self.new, str):
            return f"{self.measurement}: {self.metric}: {self.old} -> {self.new}"
        share = f", {100 * (self.new / self.old - 1):+.2f}%" if self.old else ""
        return f"{self.measurement}: {self.metric}: {self.old:.6g} -> {self.new:.6g}{share} (noise: {self.noise:.2g})"


@dataclass
class Comparison:
    """rows, values: how many were compared. remarks: what could not be."""

    worse: list[Change] = field(default_factory=list)
    better: list[Change] = field(default_factory=list)
    appeared: list[str] = field(default_factory=list)
    vanished: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    rows: int = 0
    values: int = 0


Results = Mapping[Identity, Measurement]


@dataclass(frozen=True)
class Bounds:
    """As the arguments of `compare`."""

    tolerance: float
    times: bool


def compare(old: Results, new: Results, tolerance: float = 1.0, times: bool = True) -> Comparison:
    """All that both hold, side by side; tolerance: a factor on every bound of noise.

    times: compare times of the machine too, not only those over another's of the same run. Raises ValueError where the
    two have nothing in common.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance must be more than 0, got {tolerance}")
    found = Comparison()
    found.vanished += [str(name) for name in old if name not in new]
    found.appeared += [str(name) for name in new if name not in old]
    asides: Counter[str] = Counter()
    for name in old:
        if name in new:
            _rows(found, old[name], new[name], Bounds(tolerance, times), asides)
    if not found.rows:
        raise ValueError(f"the two have no row in common: {_apart(old, new)}")
    found.remarks += [f"{text} ({count} times)" for text, count in asides.items()]
    unknown = {
        label
        for side in (old, new)
        for each in side.values()
        for line in each.by_seed.values()
        for label, value in line.items()
        if metrics.is_number(value) and not metrics.known(label) and not _names(each.identity, label)
    }
    if unknown:
        found.remarks.append(f"not compared, for no one said which way is better: {', '.join(sorted(unknown))}")
    return found


def _names(identity: Identity, label: str) -> bool:
    return label == "seed" or any(label == name for name, _ in identity.fields)


def _apart(old: Results, new: Results) -> str:
    """Why nothing fits: the benchmarks, or else the settings, of the first rows of each side."""
    first, second = (next(iter(side)) for side in (old, new))
    if first.benchmark != second.benchmark:
        return f"results of {first.benchmark} and of {second.benchmark}"
    mine, theirs = dict(first.settings), dict(second.settings)
    names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
    told = ", ".join(f"{name} {mine.get(name)} and {theirs.get(name)}" for name in names)
    return told or f"rows like {first} and {second}, or other seeds"


def _rows(found: Comparison, old: Measurement, new: Measurement, bounds: Bounds, asides: Counter[str]) -> None:
    """Add what came of the rows of one measurement."""
    label = str(old.identity)
    seeds = [seed for seed in old.by_seed if seed in new.by_seed]
    if not seeds:
        asides[f"other seeds, not compared: {old.identity.benchmark}"] += 1
        return
    alike = []
    for seed in seeds:
        found.rows += 1
        (before, _), (after, reason) = state(old.by_seed[seed]), state(new.by_seed[seed])
        if before == after:
            alike.append((old.by_seed[seed], new.by_seed[seed]))
        elif after in ABSENT and before not in ABSENT:
            found.vanished.append(f"{label}, seed {seed}: {after}: {reason}")
        elif before in ABSENT and after not in ABSENT:
            found.appeared.append(f"{label}, seed {seed}: {after} {reason}".rstrip())
        else:
            change = Change(label, f"status, seed {seed}", before, f"{after} {reason}".rstrip())
            (found.better if after == "ok" else found.worse).append(change)
    if alike:
        _metrics(found, label, alike, bounds, asides)


def _metrics(
    found: Comparison, label: str, pairs: list[tuple[Line, Line]], bounds: Bounds, asides: Counter[str]
) -> None:
    """Add what came of the metrics of pairs of rows, one a seed."""
    both = [(metrics.values(old), metrics.values(new)) for old, new in pairs]
    named = {name: metric for sides in both for side in sides for name, (metric, _) in side.items()}
    for name, metric in named.items():
        taken = [
            (old_row, new_row, old[name][1], new[name][1])
            for (old_row, new_row), (old, new) in zip(pairs, both, strict=True)
            if name in old and name in new
        ]
        if not taken:
            side = found.vanished if any(name in old for old, _ in both) else found.appeared
            side.append(f"{label}: {name}")
            continue
        if metric.comparable is Comparable.SAME_MACHINE and not bounds.times:
            asides[f"{name}: not compared, for times of the machine were not asked for"] += 1
            continue
        differing = metric.comparable.differing(taken[0][0], taken[0][1])
        if differing:
            asides[f"{name}: not compared, for the {' and '.join(differing)} differ"] += 1
            continue
        found.values += len(taken)
        change = judged(label, name, metric, taken, bounds.tolerance)
        if change is not None:
            (found.better if improved(change, metric) else found.worse).append(change)


Taken = list[tuple[Line, Line, float, float]]


def judged(label: str, name: str, metric: Metric, taken: Taken, tolerance: float) -> Change | None:
    """The change of a metric over pairs of rows and their values, None where it is no more than noise.

    A value that is no number any more is always a change.
    """
    old, new = statistics.fmean(each[2] for each in taken), statistics.fmean(each[3] for each in taken)
    differences = [after - before for _, _, before, after in taken]
    noise = metric.noise(old, new, tolerance)
    if len(taken) >= SEEDS:
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        noise = max(3 * error * tolerance, metric.noise(old, new, tolerance / 5))
    ranges = statistics.fmean(metrics.spread(a, name) + metrics.spread(b, name) for a, b, *_ in taken)
    noise = max(noise, tolerance * ranges)
    if math.isnan(old) and math.isnan(new):
        return None
    return None if abs(new - old) <= noise else Change(label, name, old, new, noise)


def improved(change: Change, metric: Metric) -> bool:
    old, new = float(change.old), float(change.new)
    if math.isnan(new) or math.isnan(old):
        return math.isnan(old)
    return (new > old) == metric.higher_is_better


def as_text(found: Comparison) -> list[str]:
    """The comparison as lines, what got worse last but for the sum."""
    parts: dict[str, list[Any]] = {
        "vanished": found.vanished,
        "appeared": found.appeared,
        "better": found.better,
        "worse": found.worse,
    }
    lines = [f"  {remark}" for remark in found.remarks]
    for title, entries in parts.items():
        lines += [f"{title} ({len(entries)}):", *(f"  {entry}" for entry in entries)] if entries else []
    counts = ", ".join(f"{len(entries)} {title}" for title, entries in parts.items())
    return [*lines, f"{found.values} values of {found.rows} rows compared: {counts}"]
