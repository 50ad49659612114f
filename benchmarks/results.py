"""Results of a run: JSON lines that say where they come from, a table, and the plot of bits against KL."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table

import kvcompress
from benchmarks.device import out_of_memory
from benchmarks.tables import markdown

AnyRow = TypeVar("AnyRow")

PACKAGES = ("torch", "triton", "transformers", "optimum-quanto", "hqq", "bitsandbytes")


@dataclass(frozen=True)
class Result:
    """One cache's row; what was not measured is None. status: "ok", else such as "not installed", "failed",
    "out of memory", with a `reason`.

    bytes, uncompressed_bytes: of the cache after one passage. KL in nats a token. Prefill in tokens per second. A
    decode step in milliseconds, and over the uncompressed cache's (step_ratio), at the settings' step_context.
    """

    cache: str
    library: str
    spec: dict[str, Any] | None
    status: str = "ok"
    reason: str | None = None
    bits_per_element: float | None = None
    effective_bits_per_element: float | None = None
    bytes: int | None = None
    uncompressed_bytes: int | None = None
    compression: float | None = None
    perplexity: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None
    scored_positions: int | None = None
    recall: float | None = None
    questions: int | None = None
    prefill_tokens_per_second: float | None = None
    step_milliseconds: float | None = None
    step_ratio: float | None = None


#: Columns of the table: heading, field, format.
COLUMNS = (
    ("bits/elem", "bits_per_element", "{:.2f}"),
    ("all held", "effective_bits_per_element", "{:.2f}"),
    ("bytes", "bytes", "{:,}"),
    ("smaller", "compression", "{:.2f}x"),
    ("perplexity", "perplexity", "{:.3f}"),
    ("KL mean", "kl_mean", "{:.2e}"),
    ("KL p99", "kl_p99", "{:.2e}"),
    ("top-1", "top1_agreement", "{:.1%}"),
    ("recall", "recall", "{:.1%}"),
    ("prefill tok/s", "prefill_tokens_per_second", "{:,.0f}"),
    ("step ms", "step_milliseconds", "{:.1f}"),
    ("step", "step_ratio", "{:.2f}x"),
)


def installed(package: str) -> str | None:
    """The version of an installed distribution, None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit that this code stands at, "-dirty" appended where it was changed; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def environment(device: str, threads: int) -> dict[str, Any]:
    """Versions, machine and commit, to stand in every line."""
    return {
        "versions": {
            "python": platform.python_version(),
            "kvcompress": kvcompress.__version__,
            **{name: installed(name) for name in PACKAGES},
        },
        "platform": platform.platform(),
        "device": device,
        "cores": os.cpu_count(),
        "threads": threads,
        "commit": commit(),
    }


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def failed(row: AnyRow, error: Exception) -> AnyRow:
    """The row of a cache that broke: the first line of its reason, and what was measured before."""
    status = "out of memory" if out_of_memory(error) else "failed"
    # a frozen dataclass with these two fields, which no type says
    return replace(row, status=status, reason=f"{type(error).__name__}: {first_line(error)}")  # type: ignore[type-var]


def write_lines(path: Path, results: Sequence[Result], shared: dict[str, Any]) -> None:
    """One JSON object a line: the row, then what all rows share (settings, versions, machine, commit)."""
    path.write_text("".join(json.dumps({**asdict(row), **shared}) + "\n" for row in results))


def cells(row: Result) -> list[str]:
    """A row as text: the cache, or why there is no more to say of it, then its numbers, a dash for what is missing."""
    name = row.cache if row.status == "ok" else f"{row.cache} ({row.status})"
    values = [getattr(row, field) for _, field, _ in COLUMNS]
    return [name, *("-" if v is None else form.format(v) for v, (_, _, form) in zip(values, COLUMNS, strict=True))]


def remarks(results: Sequence[Result]) -> list[str]:
    """A line for every row that is not, or not wholly, measured."""
    return [f"{row.cache}: {row.status}: {row.reason}" for row in results if row.reason is not None]


def rich_tables(results: Sequence[Result], title: str, width: int) -> list[Table]:
    """The table, cut into as many as it takes for each to fit into `width` characters."""
    columns = list(zip(["cache", *(heading for heading, _, _ in COLUMNS)], *map(cells, results), strict=True))
    widths = [max(map(len, column)) + 3 for column in columns]
    groups: list[list[int]] = [[]]
    for index in range(1, len(columns)):
        if groups[-1] and widths[0] + sum(widths[i] for i in groups[-1]) + widths[index] >= width:
            groups.append([])
        groups[-1].append(index)
    tables = []
    for group in groups:
        table = Table(title=title, header_style="bold", pad_edge=False)
        table.add_column("cache", no_wrap=True)
        for index in group:
            table.add_column(columns[index][0], justify="right", no_wrap=True)
        for row in zip(*(columns[index][1:] for index in [0, *group]), strict=True):
            table.add_row(*row)
        tables.append(table)
    return tables


def markdown_table(results: Sequence[Result]) -> str:
    headings = ["cache", *(heading for heading, _, _ in COLUMNS)]
    return markdown(headings, len(COLUMNS), [cells(row) for row in results])


def family(row: Result) -> str:
    """What a row's curve is called: its codec where keys and values share it, else its own name, without its bits."""
    if row.spec is None:
        return row.cache.rstrip("0123456789")
    return str(row.spec["key"]["name"]) if row.spec["key"] == row.spec["value"] else row.cache


def plot(path: Path, results: Sequence[Result], title: str) -> None:
    """Bits per element of the coded part against mean KL on a log scale, families joined, written as PNG.

    Left out: what loses nothing that could be seen (KL below 1e-7), which a log scale cannot show.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    families: dict[str, list[tuple[float, float, str]]] = {}
    for row in results:
        if row.bits_per_element is not None and row.kl_mean is not None and row.kl_mean > 1e-7:
            families.setdefault(family(row), []).append(
                (row.bits_per_element, row.kl_mean, row.cache.removeprefix("QuantizedCache "))
            )
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, points in families.items():
        bits, kl, labels = zip(*sorted(points), strict=True)
        axes.plot(bits, kl, "s--" if name.startswith("QuantizedCache") else "o-", label=name)
        for place in zip(bits, kl, labels, strict=True):
            axes.annotate(place[2], place[:2], textcoords="offset points", xytext=(6, 5), fontsize=8)
    axes.set(
        yscale="log",
        xlabel="bits per element, measured, with overheads",
        ylabel="KL to the uncompressed model, nats per token",
    )
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3, which="both")
    if families:
        axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
