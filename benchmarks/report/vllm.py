"""vLLM with the plugin and without it, from `python -m benchmarks.vllm_check`."""

from __future__ import annotations

from benchmarks import vllm_check
from benchmarks.report.parts import Part, Table
from benchmarks.report.sources import Source
from benchmarks.vllm_check import OWN, ServerRow

ABOUT = """vLLM is a server of many requests at once. A plugin makes its blocks hold codes in place of numbers, while
its scheduling, paging and prefix caching go on as before. The same small model is served with vLLM's own cache and with
codes, in the same memory: how many tokens fit (more is better), and whether the same comes out (nearer to 100% is
better). Greedy texts go their own ways after a first token that differs, so the likeliest token after a given text is
the fairer measure."""

NOTE = """*tokens in 64 MiB*: as vLLM's log says; *times*: those of its own cache. *equal greedy tokens*: before the
first that differs from vLLM's own; *equal again*: when the same prompts come again, their beginnings from the prefix
cache. *same top token*: the likeliest one after every token of given texts; *log-prob*: the mean magnitude by which the
texts' tokens' log-probabilities differ, nats."""


def part(source: Source) -> Part:
    rows = source.rows(ServerRow)
    server = sorted({f"vLLM {line['vllm']}" for line in source.lines if line.get("vllm")})
    coded = [row for row in rows if row.cache != OWN]
    caption = f"{', '.join(server) or 'vLLM'} with codes in its blocks"
    return Part(_said(coded), (), (), (Table(caption, vllm_check.table(rows), note=NOTE),))


def _said(rows: list[ServerRow]) -> str:
    told = [f"{row.cache} {row.capacity_ratio:.1f} times as many ({row.top_share:.1%})" for row in rows]
    if not told:
        return ""
    return (
        "Tokens that a vLLM server holds in the memory of its own cache, and how often the likeliest next token is the "
        f"same: {', '.join(told)}."
    )
