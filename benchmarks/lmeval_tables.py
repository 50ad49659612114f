"""table.md of `python -m benchmarks lmeval`: a table for every task and part of it, one line a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.frontier_tables import markdown
from benchmarks.lmeval_rows import Row

NOTES = """Every text is read through the cache in chunks, answers included; values are lm-eval's, ± its standard error.
*bits/elem*: bits of coded storage, overheads included, for each coded element. *coded*: the share of all elements that
were coded when a text had been read: sinks, the recent window and texts too short to begin with are exact. Where it is
small the task says little about a cache."""


def document(rows: Sequence[Row], title: str, remarks: Sequence[str] = ()) -> str:
    """The whole of table.md."""
    parts = [f"# lm-eval: {title}", NOTES]
    for task, name in dict.fromkeys((row.task, name) for row in rows for name in row.metrics or {}):
        own = [row for row in rows if row.task == task and row.metrics and name in row.metrics]
        heading = name if name == task else f"{task}: {name}"
        parts += [f"## {heading}", table(own, name)]
    parts += [f"{row.cache}: {row.status} ({row.task}): {row.reason}" for row in rows if row.status != "ok"]
    return "\n\n".join([*parts, *remarks]) + "\n"


def table(rows: Sequence[Row], name: str) -> str:
    """The caches' metrics of one part of a task."""
    found = [(row, (row.metrics or {})[name]) for row in rows]
    metrics = [metric for metric in dict.fromkeys(m for _, own in found for m in own) if "_stderr" not in metric]
    lines = []
    for row, own in found:
        bits = "-" if row.bits_per_element is None else f"{row.bits_per_element:.2f}"
        coded = "-" if row.coded is None else f"{row.coded:.0%}"
        asked = (row.questions or {}).get(name)
        count = "-" if asked is None else str(asked)
        lines.append([row.cache, bits, coded, count, *(told(own, metric) for metric in metrics)])
    return markdown(["cache", "bits/elem", "coded", "questions", *metrics], lines)


def told(own: Mapping[str, float], metric: str) -> str:
    """A metric with its standard error, where lm-eval gives one."""
    kind, _, rest = metric.partition(",")
    value, error = own.get(metric), own.get(f"{kind}_stderr,{rest}")
    if value is None:
        return "-"
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"
