"""table.md and parallel.png of `python -m benchmarks parallel`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.parallel_estimate import Estimate
from benchmarks.parallel_rows import Row
from benchmarks.tables import markdown
from kvcompress.memory import format_bytes

HEADINGS = (
    "cache", "ranks", "pages of a rank, bytes", "held by a rank, bytes", "between ranks, a token", "collectives",
    "off by",
)  # fmt: skip

NOTES = """*Pages*, *held*: of the rank that has least and of the one that has most, counted over real storage. *Between
ranks*: bytes that a rank hands to its collectives for a decoded token. *Off by*: the last logits from a single rank's,
at most, as a share of the largest."""

#: What bars are made of, from the axis on, and their colours.
MEASURED = {"its share of the pages": "#2f6fdf", "held by every rank": "#e0662b"}
CALCULATED = {
    "weights": "#7d8797",
    "its share of the pages": "#2f6fdf",
    "windows, bases, tables, activations": "#7a5bd6",
}


def document(rows: Sequence[Row], estimates: Sequence[Estimate], title: str) -> str:
    """All that was measured, then what was calculated and what that rests on."""
    lines = [
        "# One context over several devices\n",
        f"Measured: {title}. {NOTES}\n",
        table(rows),
    ]
    lines += [f"* {row.cache}, {row.ranks} ranks: {row.status}: {row.reason}\n" for row in rows if row.reason]
    for each in estimates:
        lines.append(calculated(each))
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> str:
    return markdown(HEADINGS, 6, [_cells(row) for row in rows])


def _cells(row: Row) -> list[str]:
    if row.status != "ok" or row.page_bytes is None or row.held_bytes is None:
        return [row.cache, str(row.ranks), row.status, *"-" * 4]
    ends = [f"{min(sizes):,} to {max(sizes):,}" for sizes in (row.page_bytes, row.held_bytes)]
    return [
        row.cache,
        str(row.ranks),
        *ends,
        f"{row.step_payload:,}",
        f"{row.step_collectives}",
        f"{row.difference:.1e}",
    ]


def calculated(each: Estimate) -> str:
    """An estimate as text."""
    machine = each.machine
    parts = {
        "weights": each.weights, "its pages": each.pages, "its page tables": each.tables,
        "sinks and windows": each.exact, "bases and means": each.learned,
        "activations of a chunk": each.activations, "in all": each.total,
    }  # fmt: skip
    fits = "fits" if each.total <= machine.memory else "does not fit"
    return "\n".join(
        [
            f"## {machine.gpus} GPUs, {each.tokens:,} tokens of {each.geometry} ({each.spec})\n",
            "Calculated, not measured.\n",
            markdown(("a GPU holds", "bytes", ""), 2, [[k, f"{v:,}", format_bytes(v)] for k, v in parts.items()]),
            f"It {fits} into {format_bytes(machine.memory)}.\n",
            markdown(
                ("between GPUs", "handed to all-reduces", "sent by a GPU", "time"),
                3,
                [
                    ["a decoded token", *_traffic(each.step_payload, each.step_sent, each.step_link_seconds)],
                    [
                        f"a chunk of {each.chunk:,}",
                        *_traffic(each.chunk_payload, each.chunk_sent, each.chunk_link_seconds),
                    ],
                ],
            ),
            f"A token takes {1000 * each.step_read_seconds:.1f} ms at least to read weights and pages.\n",
            *(f"* {line}" for line in each.assumptions),
            "",
        ]
    )


def _traffic(payload: int, sent: int, seconds: float) -> list[str]:
    return [format_bytes(payload), format_bytes(sent), f"{1000 * seconds:.2f} ms"]


def plot(path: Path, rows: Sequence[Row], estimates: Sequence[Estimate], title: str) -> None:
    """Write the PNG: bytes of the fullest rank as measured, and of a GPU as calculated."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    measured([row for row in rows if row.page_bytes and row.held_bytes], left)
    calculated_bars(estimates, right)
    first = estimates[0]
    left.set_title(f"Measured: {title}")
    right.set_title(f"Calculated: {first.tokens:,} tokens of {first.geometry}\n({first.spec})")
    for axes, along in ((left, "x"), (right, "y")):
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3, axis=along)
        axes.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def measured(rows: Sequence[Row], axes: Any) -> None:
    """A bar for each row: bytes of the fullest rank, in the parts of MEASURED."""
    labels = [f"{row.cache}, {row.ranks} rank{'s' * (row.ranks > 1)}" for row in rows]
    pages = [max(row.page_bytes or [0]) / 2**20 for row in rows]
    held = [max(row.held_bytes or [0]) / 2**20 for row in rows]
    sizes = (pages, [h - p for h, p in zip(held, pages, strict=True)])
    left = [0.0] * len(rows)
    for (name, colour), widths in zip(MEASURED.items(), sizes, strict=True):
        axes.barh(labels, widths, left=left, label=name, color=colour)
        left = widths
    axes.set_xlabel("MiB of the fullest rank")
    axes.invert_yaxis()


def calculated_bars(estimates: Sequence[Estimate], axes: Any) -> None:
    """A bar for each number of GPUs: bytes of one, in the parts of CALCULATED, and what it has."""
    names = [f"{each.machine.gpus} GPU{'s' * (each.machine.gpus > 1)}" for each in estimates]
    known = [(each.weights, each.pages, each.total - each.weights - each.pages) for each in estimates]
    bottom = [0.0] * len(estimates)
    for (name, colour), sizes in zip(CALCULATED.items(), zip(*known, strict=True), strict=True):
        heights = [size / 2**30 for size in sizes]
        axes.bar(names, heights, bottom=bottom, label=name, color=colour)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.axhline(estimates[0].machine.memory / 2**30, color="#d23f4f", lw=1.4, label="what a GPU has")
    axes.set_ylabel("GiB of a GPU")
