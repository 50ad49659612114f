"""reading.md: one paragraph that says in words what the rows say in numbers, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.caches import OUR_SIDE, PEER_SIDE, UNCOMPRESSED
from benchmarks.frontier_tables import RATES, multiple, told
from benchmarks.pareto import (
    AtBits,
    Panel,
    Ratio,
    at_bits,
    best_at,
    optimal,
    panels,
    ratio,
    summarise,
)
from benchmarks.rows import Row

#: The rate at which a panel is described in words, and the families that a hard variant is held against.
RATE, RIVALS = 3.0, ("TurboQuant", "QuantizedCache")
HARD, LOW_RANK = "-hard", "low rank"
APART = "has points on both sides"


def paragraph(rows: Sequence[Row]) -> str:
    """The whole reading."""
    found = panels(rows)
    first = next(iter(found))[0]
    longest = max(tokens for subject, tokens in found if subject == first)
    sentences = [seeds(rows)]
    for panel, own in found.items():
        sentences.append(described(panel, own))
        if panel == (first, longest):
            sentences += [frontier(own), beside(own), low_rank(own)]
        plain = found.get((panel[0].removesuffix(HARD), panel[1]))
        if panel[0].endswith(HARD) and plain is not None:
            sentences.append(hardship(own, plain))
    sentences += [behind(found), left_out(rows)]
    return " ".join(sentence for sentence in sentences if sentence)


def seeds(rows: Sequence[Row]) -> str:
    count = len({row.seed for row in rows})
    what = "one seed, so no spread is known" if count == 1 else f"means over {count} seeds, in brackets single seeds"
    return (
        f"At equal measured bits per coded element, overheads included ({what}; tokens kept exact come on top, and "
        "weigh most at short contexts):"
    )


def described(panel: Panel, rows: Sequence[Row]) -> str:
    """The best of both sides at RATE."""
    unit = "nats of KL per token" if any(row.kl_mean is not None for row in rows) else "relative output error"
    ours, peer = best_at(rows, OUR_SIDE, RATE), best_at(rows, PEER_SIDE, RATE)
    where = f"On {panel[0]} at {panel[1]} tokens and {RATE:g} bits"
    if ours is not None and peer is not None:
        return (
            f"{where} the best of ours is {ours.family} with {ours.spread.mean:.2e} {unit}, "
            f"{_times(ratio(ours, peer))} the best peer's ({peer.family}, {peer.spread.mean:.2e})."
        )
    if ours is not None:
        return f"{where} the best of ours is {ours.family} with {ours.spread.mean:.2e} {unit}; no peer {APART}."
    if peer is not None:
        return f"{where} the best peer is {peer.family} with {peer.spread.mean:.2e} {unit}; no family of ours {APART}."
    return f"{where} nothing can be compared: no family {APART}."


def frontier(rows: Sequence[Row]) -> str:
    """How many Pareto-optimal caches are ours, up to twice RATE."""
    summaries = [each for each in summarise(rows) if each.bits is not None and each.bits <= 2 * RATE]
    best = optimal(summaries)
    names = [each.cache for each in summaries if each.cache in best]
    count = sum(each.side == OUR_SIDE for each in summaries if each.cache in best)
    if not names:
        return ""
    return f"Pareto-optimal there up to {2 * RATE:g} bits: {', '.join(names)}, {count} of {len(names)} ours."


def beside(rows: Sequence[Row]) -> str:
    """What the cache of the lowest loss at no more than RATE + 0.5 bits gives, beside the uncompressed one."""
    summaries = summarise(rows)
    base = next((each for each in summaries if each.cache == UNCOMPRESSED.name), None)
    near = [each for each in summaries if each.bits is not None and each.bits <= RATE + 0.5 and each.loss is not None]
    if not near or base is None:
        return ""
    best = min(near, key=lambda each: each.loss or 0.0)
    parts = [
        f"{name} {form.format(best.values[field].mean)} (uncompressed {form.format(base.values[field].mean)})"
        for name, field, form in (
            ("perplexity", "perplexity", "{:.3f}"),
            ("single-needle recall", "needle_recall", "{:.0%}"),
            ("multi-key recall", "key_recall", "{:.1%}"),
            ("greedy tokens on the same path", "greedy_tokens", "{:.1f}"),
        )
        if field in best.values and field in base.values
    ]
    said = f", {'; '.join(parts)}" if parts else ""
    return f"The least loss up to {RATE + 0.5:g} bits there has {best.cache} ({best.bits:.2f} bits){said}."


def low_rank(rows: Sequence[Row]) -> str:
    """Rank reduction alone, against the smallest other cache of ours that loses no more."""
    ours = [each for each in summarise(rows) if each.side == OUR_SIDE and each.bits is not None]
    alone = [each for each in ours if each.family == LOW_RANK and each.loss is not None]
    if not alone:
        return ""
    best = min(alone, key=lambda each: each.loss or 0.0)
    others = [each for each in ours if each.family != LOW_RANK and (each.loss or 0.0) <= (best.loss or 0.0)]
    said = f"Low rank alone loses least as {best.cache}, {best.loss:.2e} at {best.bits:.2f} bits"
    if not others:
        return f"{said}; no other cache of ours loses as little."
    small = min(others, key=lambda each: each.bits or 0.0)
    return f"{said}; {small.cache} loses {small.loss:.2e} at {small.bits:.2f} bits."


def hardship(hard: Sequence[Row], plain: Sequence[Row]) -> str:
    """At RATE, the best of ours on the hard variant against its own family on the plain model, and against RIVALS."""
    ours = best_at(hard, OUR_SIDE, RATE)
    if ours is None:
        return ""
    parts = []
    easy = next((each for each in at_bits(plain, OUR_SIDE, RATE) if each.family == ours.family), None)
    if easy is not None:
        parts.append(f"{_times(ratio(ours, easy))} its own on the plain model")
    for rival in RIVALS:
        best = next((each for each in at_bits(hard, PEER_SIDE, RATE) if each.family.startswith(rival)), None)
        if best is not None:
            parts.append(f"{_times(ratio(ours, best))} that of {best.family}")
    return f"This KL of {ours.family} on the hard variant is {', and '.join(parts)}." if parts else ""


def behind(found: dict[Panel, list[Row]]) -> str:
    """Where the best of ours loses more than the best peer at RATES, and where it loses more than half as much."""
    worse, close, compared = [], [], 0
    for (subject, tokens), rows in found.items():
        for bits in RATES:
            sides: list[AtBits | None] = [best_at(rows, side, bits) for side in (OUR_SIDE, PEER_SIDE)]
            over = ratio(sides[0], sides[1]) if sides[0] is not None and sides[1] is not None else None
            if over is not None:
                compared += 1
                place = f"{subject} {tokens} at {bits:g} bits ({multiple(over.mean)})"
                worse += [place] if over.mean > 1 else []
                close += [place] if 0.5 < over.mean <= 1 else []
    if not compared:
        return ""
    rates = ", ".join(f"{bits:g}" for bits in RATES)
    return (
        f"Of {compared} such comparisons at {rates} bits the best of ours loses more than the best peer in {len(worse)}"
        f"{_listed(worse)}, and more than half as much in {len(close)} others{_listed(close)}."
    )


def left_out(rows: Sequence[Row]) -> str:
    """How many caches are missing."""
    absent = list(dict.fromkeys(row.cache for row in rows if row.status != "ok"))
    return f"Not, or not everywhere, measured: {', '.join(absent)}." if absent else ""


def _listed(places: Sequence[str]) -> str:
    return f" ({'; '.join(places)})" if places else ""


def _times(found: Ratio | None) -> str:
    return "an unknown multiple of" if found is None else f"{told(found)} times"
