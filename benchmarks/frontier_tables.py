"""pareto.md: all caches of every subject and context with their spread over seeds, then comparisons at equal bits."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import tables
from benchmarks.caches import OUR_SIDE, PEER_SIDE, REFERENCE
from benchmarks.pareto import AtBits, Panel, Ratio, Spread, Summary, at_bits, best_at, optimal, panels, ratio, summarise
from benchmarks.rows import Row

#: Bits per element at which the best of ours and the best peer are set side by side.
RATES = (2.0, 2.5, 3.0, 4.0)

#: Peers of more bits than this are not compared at their own bits: no curve of ours goes on so far.
MOST_BITS = 6.0

#: Columns: heading, field, format of the mean, whether the deviation over seeds is shown.
COLUMNS = (
    ("bits/elem", "bits_per_element", "{:.2f}", False),
    ("all held", "effective_bits_per_element", "{:.2f}", False),
    ("bytes", "bytes", "{:,.0f}", False),
    ("KL mean", "kl_mean", "{:.2e}", True),
    ("KL p99", "kl_p99", "{:.2e}", True),
    ("top-1", "top1_agreement", "{:.1%}", True),
    ("perplexity", "perplexity", "{:.3f}", True),
    ("needle", "needle_recall", "{:.0%}", False),
    ("multi-key", "key_recall", "{:.1%}", True),
    ("greedy tokens", "greedy_tokens", "{:.1f}", True),
    ("output error", "output_error", "{:.2e}", True),
    ("seconds", "seconds", "{:.1f}", False),
)

NOTES = """*bits/elem*: bits of coded storage, scales, bases and tables included, for each coded element (a dash:
nothing was coded); *all held*: every byte held, for each element, with exact sinks, the window and whatever else there
is. *KL*: nats per token to the uncompressed model's prediction, over plain text. *needle*: one fact, asked for
before there are others; *multi-key*: facts among others like them. *greedy tokens*: before greedy decoding from the
filled cache first leaves the uncompressed model's path. *output error*: squared error of attention's output over its
squared size. ± is the standard deviation over seeds. *seconds*: of the whole measurement on the machine that the rows
name. Bold: Pareto-optimal, no other cache here has as few bits and loses as little. QuantizedCache keeps its scales in
the model's dtype: in float32 that is half a bit an element more than in 16 bits."""


def document(rows: Sequence[Row], remarks: Sequence[str] = ()) -> str:
    """The whole of pareto.md."""
    parts = ["# Quality against measured bits", NOTES]
    for panel, own in panels(rows).items():
        parts += [f"## {title(panel, own)}", table(own), *not_measured(own)]
        parts += ["Best at equal bits, between the points of a family:", equal_bits(own)]
        against = peers_at_their_bits(own)
        parts += ["Every peer, and the best of ours at the peer's bits:", against] if against else []
    parts += [f"* {remark}" for remark in remarks]
    return "\n\n".join(parts) + "\n"


def title(panel: Panel, rows: Sequence[Row]) -> str:
    seeds = len({row.seed for row in rows})
    return f"{panel[0]}, {panel[1]} tokens, {seeds} seed{'s' if seeds > 1 else ''}"


def markdown(heading: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose columns but the first stand right."""
    return tables.markdown(heading, len(heading) - 1, lines).removesuffix("\n")


def written(spread: Spread, form: str, deviation: bool = True) -> str:
    """`mean ± deviation`, or the mean alone."""
    if spread.deviation is None or not deviation:
        return form.format(spread.mean)
    small = "{:.0e}" if "e" in form else form
    return f"{form.format(spread.mean)} ± {small.format(spread.deviation)}"


def table(rows: Sequence[Row]) -> str:
    """All measured caches of a panel, by bits; columns that nothing here has are left out."""
    summaries = summarise(rows)
    best, seeds = optimal(summaries), len({row.seed for row in rows})
    columns = [column for column in COLUMNS if any(column[1] in each.values for each in summaries)]

    def line(each: Summary) -> list[str]:
        name = f"**{each.cache}**" if each.cache in best else each.cache
        name += "" if each.seeds == seeds else f" ({each.seeds} of {seeds} seeds)"
        cells = [
            written(each.values[field], form, shown) if field in each.values else "-"
            for _, field, form, shown in columns
        ]
        return [name, "" if each.side == REFERENCE else each.side, *cells]

    return markdown(["cache", "", *(heading for heading, *_ in columns)], [line(each) for each in summaries])


def not_measured(rows: Sequence[Row]) -> list[str]:
    """One paragraph for each reason for which caches of a panel were not measured."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.status != "ok":
            names = reasons.setdefault((row.status, row.reason or ""), [])
            names += [row.cache] if row.cache not in names else []
    return [f"{', '.join(names)}: {status}: {reason}" for (status, reason), names in reasons.items()]


def equal_bits(rows: Sequence[Row]) -> str:
    """The best of ours and the best peer at RATES, with their ratio and its range over seeds."""
    lines = []
    for bits in RATES:
        ours, peer = best_at(rows, OUR_SIDE, bits), best_at(rows, PEER_SIDE, bits)
        lines.append([f"{bits:g}", *_named(ours), *_named(peer), _ratio(ours, peer)])
    return markdown(["bits/elem", "best of ours", "loss", "best peer", "loss", "ours / peer (over seeds)"], lines)


def peers_at_their_bits(rows: Sequence[Row]) -> str | None:
    """Every coded peer of up to MOST_BITS with the best of ours at exactly its bits; None where there is none."""
    lines = []
    for each in summarise(rows):
        if each.side == PEER_SIDE and each.bits is not None and each.loss is not None and each.bits <= MOST_BITS:
            by_seed = {row.seed: row for row in rows if row.cache == each.cache and row.status == "ok"}
            peer = next((found for found in at_bits(list(by_seed.values()), PEER_SIDE, each.bits)), None)
            ours = best_at(rows, OUR_SIDE, each.bits)
            form = Spread(each.loss, None) if peer is None else peer.spread
            lines.append([each.cache, f"{each.bits:.2f}", written(form, "{:.2e}"), *_named(ours), _ratio(ours, peer)])
    heading = ["peer", "bits/elem", "loss", "best of ours there", "loss", "ours / peer (over seeds)"]
    return markdown(heading, lines) if lines else None


def _named(found: AtBits | None) -> list[str]:
    return ["-", "-"] if found is None else [found.family, written(found.spread, "{:.2e}")]


def _ratio(ours: AtBits | None, peer: AtBits | None) -> str:
    found = ratio(ours, peer) if ours is not None and peer is not None else None
    return "-" if found is None else told(found)


def told(found: Ratio) -> str:
    """A ratio, with its range where there are several seeds."""
    if found.seeds == 1:
        return multiple(found.mean)
    return f"{multiple(found.mean)} ({multiple(found.lowest)} to {multiple(found.highest)})"


def multiple(value: float) -> str:
    """Two digits, and no exponent for large numbers."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
