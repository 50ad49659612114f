"""Short sections: lm-eval's tasks, the rise of memory during a prefill, the codes alone, the embedded model itself."""

from __future__ import annotations

from benchmarks import code_error as errors
from benchmarks import lmeval_tables
from benchmarks.lmeval_rows import Row as TaskRow
from benchmarks.prefill_memory import PrefillRow
from benchmarks.report.parts import Part, Table
from benchmarks.report.sources import Source
from benchmarks.tables import markdown

LMEVAL = """Tasks of lm-eval, every text read through the cache. Where the share that was coded is small, a task says
little about a cache."""
PREFILL = """A prompt goes through our cache chunk by chunk, and the process's memory is watched: it should never come
near what the uncompressed cache alone would take."""
CODES = """The scalar and trellis codes by themselves, on vectors of unit Gaussians, beside what rate-distortion theory
says that no code can fall below."""
EMBEDDED = """The small model that ships with the package, and that everything above is measured on where no other is
named: what it can do at all, uncompressed."""


def lmeval(source: Source) -> Part:
    rows = source.rows(TaskRow)
    tables = tuple(
        Table(name if name == task else f"{task}: {name}", lmeval_tables.table(own, name), note=lmeval_tables.NOTES)
        for task, name in dict.fromkeys((row.task, name) for row in rows for name in row.metrics or {})
        for own in [[row for row in rows if row.task == task and name in (row.metrics or {})]]
    )
    caches, tasks = ({getattr(row, field) for row in rows if row.status == "ok"} for field in ("cache", "task"))
    headline = f"{len(caches)} caches were measured on lm-eval's {', '.join(sorted(tasks))}; see the tables."
    missing = tuple(f"{row.cache}, {row.task}: {row.status}: {row.reason}" for row in rows if row.status != "ok")
    return Part(headline, (), (), tables, missing, source.subject)


def prefill_memory(source: Source) -> Part:
    said, lines = [], []
    for row in source.rows(PrefillRow):
        said.append(
            f"A prefill of {row.tokens:,} tokens with {row.cache} raised the process's memory by "
            f"{row.peak_bytes / 1e6:,.0f} MB at most, {row.peak_bytes / row.uncompressed_bytes:.0%} of the "
            f"{row.uncompressed_bytes / 1e6:,.0f} MB of the uncompressed cache alone."
        )
        sizes = (f"{size / 1e6:,.1f}" for size in (row.peak_bytes, row.cache_bytes, row.uncompressed_bytes))
        lines.append([row.cache, f"{row.tokens:,}", f"{row.chunk:,}", *sizes])
    headings = ["cache", "tokens", "chunk", "most above the start, MB", "cache, MB", "uncompressed cache, MB"]
    table = Table("Memory during a prefill", markdown(headings, 5, lines))
    return Part(said[0], tuple(said[1:]), (), (table,))


def code_error(source: Source) -> Part:
    rows = source.rows(errors.ErrorRow)
    shares = [row.trellis / row.lloyd for row in rows]
    headline = (
        f"The trellis code's squared error is {min(shares):.0%} to {max(shares):.0%} of Lloyd-Max's at equal bits."
    )
    table = Table("Mean squared error", errors.table(rows))
    return Part(headline, (), (), (table,))


def embedded(source: Source) -> Part:
    (found,) = source.lines
    contexts = sorted({*found["bits_per_byte"], *found["recall"]}, key=int)
    lines = [
        [name, *(form.format(found[field][tokens]) if tokens in found[field] else "-" for tokens in contexts)]
        for name, field, form in (
            ("bits per byte", "bits_per_byte", "{:.3f}"),
            ("recall of stated facts", "recall", "{:.1%}"),
        )
    ]
    table = Table("By tokens of context", markdown(["", *contexts], len(contexts), lines))
    said = f"{found['parameters']:,} parameters, measured on {found['book']}, which training never saw."
    return Part("", (said,), (), (table,))
