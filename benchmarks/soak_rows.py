"""The row of `python -m benchmarks soak`, and its table.md."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.soak_slope import Slope
from benchmarks.tables import markdown

#: What is compared: its name, and its key in the server's numbers.
COUNTS = {
    "requests answered (200)": ("requests_total", "200"),
    "requests refused (400)": ("requests_total", "400"),
    "requests cancelled (499)": ("requests_total", "499"),
    "requests failed (500)": ("requests_total", "500"),
    "prompt tokens of answers": ("prompt_tokens_total", "200"),
    "generated tokens of answers": ("generated_tokens_total", "200"),
}


@dataclass(frozen=True)
class Row:
    """One soak. status: "ok", "lost" or "disagreement", with a `reason`.

    requests: by kind. client, server: counts by name (COUNTS). lost: requests that went otherwise than they should.
    rss_*: bytes a minute of the server process, cache_*: of the caches of running requests, each with the ends of its
    95% confidence interval (_low, _high), over the samples after the start. rss_mean, cache_peak: bytes.
    continuous_batching: in place of a prefix store.
    """

    spec: str
    seconds: float
    samples: int
    requests: dict[str, int]
    client: dict[str, int]
    server: dict[str, int]
    lost: int
    prefix_hits: int
    rss_mean: float
    rss_slope: float
    rss_low: float
    rss_high: float
    cache_peak: float
    cache_slope: float
    cache_low: float
    cache_high: float
    cache_at_end: float
    status: str = "ok"
    reason: str | None = None
    continuous_batching: bool = False

    @property
    def key(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        return self.spec + ", continuous batching" * self.continuous_batching

    @property
    def rss(self) -> Slope:
        """Growth of the process."""
        return Slope(self.rss_slope, self.rss_low, self.rss_high)

    @property
    def caches(self) -> Slope:
        """Growth of the caches of running requests."""
        return Slope(self.cache_slope, self.cache_low, self.cache_high)


def judged(client: dict[str, int], server: dict[str, int], lost: list[str]) -> tuple[str, str | None]:
    """Status and reason of a soak."""
    if lost:
        return "lost", f"{len(lost)} requests, first {lost[0]}"
    apart = [f"{name}: {client[name]} here, {server[name]} there" for name in client if client[name] != server[name]]
    return ("disagreement", "; ".join(apart)) if apart else ("ok", None)


def document(row: Row) -> str:
    """The whole of table.md."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(row.requests.items()))
    parts = [
        "# A server under mixed requests",
        f"`kvcompress serve --spec {row.spec}{' --continuous-batching' * row.continuous_batching}` for "
        f"{row.seconds / 60:.1f} minutes: {kinds}. "
        f"{row.lost} requests were lost"
        + ("." if row.continuous_batching else f"; {row.prefix_hits} prompts went on from a stored prefix."),
        counts(row),
        f"Growth a minute, with 95% confidence intervals: memory of the process {growth(row.rss)} "
        f"(mean {row.rss_mean / 2**20:,.0f} MiB), caches of running requests {growth(row.caches)} "
        f"(at most {row.cache_peak / 2**20:,.2f} MiB, at the end {row.cache_at_end:,.0f} bytes).",
    ]
    if row.reason:
        parts.append(f"* {row.status}: {row.reason}")
    return "\n\n".join(parts) + "\n"


def counts(row: Row) -> str:
    """What both sides counted, as a table."""
    lines = [[name, f"{row.client[name]:,}", f"{row.server[name]:,}"] for name in COUNTS]
    return markdown(["count", "of the clients", "of the server"], 2, lines)


def growth(slope: Slope) -> str:
    """A minute's growth with its interval."""
    return f"{slope.value / 1024:+,.1f} KiB ({slope.low / 1024:+,.1f} to {slope.high / 1024:+,.1f})"
