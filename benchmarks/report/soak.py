"""A server under mixed requests, from `python -m benchmarks soak`."""

from __future__ import annotations

from benchmarks.report.parts import Part, Table
from benchmarks.report.sources import Source
from benchmarks.soak_rows import Row, counts, growth
from benchmarks.tables import markdown

ABOUT = """A server with compressed caches (`kvcompress serve`, OpenAI's API) is asked by several clients at once for
all sorts of things: chats, streamed answers, long prompts that begin alike, prompts too long for it, requests that the
client drops in the middle. Right is that none is lost, that the server's own metrics count what its clients count, and
that its memory does not grow: growth is that of a line through the samples after the start, with its 95% confidence
interval, which should hold 0."""


def part(source: Source) -> Part:
    rows = source.rows(Row)
    counted = tuple(Table(f"Counts of {row.seconds / 60:.1f} minutes with {row.name}", counts(row)) for row in rows)
    headings = [
        "server", "minutes", "requests", "lost", "prefix hits", "memory, MiB", "its growth a minute",
        "growth of caches a minute", "left in caches, bytes",
    ]  # fmt: skip
    note = "*memory*: of the server process, mean; *caches*: of running requests, of which nothing should be left at "
    note += "the end. Growth with its 95% confidence interval."
    table = Table("Requests and memory", markdown(headings, len(headings) - 1, list(map(_line, rows))), note=note)
    headline, *found = map(_said, rows)
    remarks = tuple(f"{row.name}: {row.status}: {row.reason}" for row in rows if row.reason)
    return Part(headline, tuple(found), (), (table, *counted), remarks, source.subject)


def _said(row: Row) -> str:
    asked = sum(row.requests.values())
    agree = "agree" if all(row.client[name] == row.server[name] for name in row.client) else "do not agree"
    sure = "which holds 0" if row.rss.low <= 0 <= row.rss.high else "which does not hold 0"
    return (
        f"In {row.seconds / 60:.1f} minutes with {row.name} {row.lost} of {asked:,} requests were lost, the server's "
        f"counts and the clients' {agree}, and its memory of {row.rss_mean / 2**20:,.0f} MiB grew by {growth(row.rss)} "
        f"a minute, an interval {sure}."
    )


def _line(row: Row) -> list[str]:
    counts = (sum(row.requests.values()), row.lost, row.prefix_hits)
    return [
        row.name,
        f"{row.seconds / 60:.1f}",
        *(f"{count:,}" for count in counts),
        f"{row.rss_mean / 2**20:,.0f}",
        growth(row.rss),
        growth(row.caches),
        f"{row.cache_at_end:,.0f}",
    ]
