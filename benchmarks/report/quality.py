"""The frontier: loss against measured bits, from `python -m benchmarks quality`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks import frontier_reading, frontier_tables
from benchmarks.caches import OUR_SIDE, PEER_SIDE
from benchmarks.frontier_plot import shown
from benchmarks.pareto import Panel as Where
from benchmarks.pareto import Summary, best_at, optimal, panels, ratio, summarise
from benchmarks.report import styles, svg
from benchmarks.report.parts import Figure, Panel, Part, Table
from benchmarks.report.sources import Source
from benchmarks.rows import Row
from benchmarks.tables import markdown

ABOUT = """Every cache reads the same documents in the same chunks; what it then predicts is compared with what the
uncompressed model predicts. Further left is smaller, further down is closer to uncompressed: a cache is worth having
where nothing lies both left of and below it. KL, in nats per token, says how far the prediction moved: 0 is
uncompressed. Bits are measured, scales, bases and tables included."""


#: What the subjects of `benchmarks.frontier_subjects` are, by the end of their name.
SUBJECTS = {
    "embedded": "the small model that ships with the package, on a book that its training never saw",
    "-hard": "the same model with channels of keys and values made outliers, as big models have them",
    "stories260k": "a public model of 260 thousand parameters with heads of 8, on children's stories",
    "spectra": "no model, random tensors with the eigenvalues of real heads",
}


def part(source: Source) -> Part:
    rows = source.rows(Row)
    found = panels(rows)
    first = next(iter(found))[0]
    main = first, max(tokens for subject, tokens in found if subject == first)
    styled = {(row.side, row.family): styles.family_style(row.side, row.family) for row in rows}
    drawn = {(each.side, each.family) for own in found.values() for each in shown(summarise(own))}
    legend = tuple((pair[1], svg.swatch(style)) for pair, style in styled.items() if pair in drawn)
    caption = (
        "Loss against measured bits, lower left is better: KL divergence to the uncompressed model's prediction, or, "
        "where no model is run, the error of attention's output. Full lines and filled marks are ours, dashed lines "
        "and hollow marks the peers' methods; the broad grey line joins the caches that no other one beats, with "
        "their names as far as there is room. Each mark is a mean over seeds. "
    )
    caption += _subjects(found)
    pictures = tuple(
        Panel(frontier_tables.title(where, own), _picture(where, own, styled)) for where, own in found.items()
    )
    return Part(
        headline=_headline(main, found),
        found=tuple(sentence for sentence in _sentences(found, main) if sentence),
        figures=(Figure(caption, pictures, legend),),
        tables=(_equal(found), *(_all(where, own) for where, own in found.items())),
        remarks=tuple(dict.fromkeys(text for own in found.values() for text in frontier_tables.not_measured(own))),
        subject=source.subject,
    )


def _headline(main: Where, found: Mapping[Where, list[Row]]) -> str:
    """What the best of both sides lose on the first subject, which is explained, and how all comparisons went."""
    name = main[0]
    what = "".join(f" ({said})" for end, said in SUBJECTS.items() if name.endswith(end))
    said = frontier_reading.described(main, found[main]).replace(f"On {name} at", f"On {name}{what} at", 1)
    return f"{said} {_lost(found)}".strip()


def _subjects(found: Iterable[Where]) -> str:
    """What the panels were measured on."""
    names = dict.fromkeys(subject for subject, _ in found)
    told = [f"*{name}*: {said}" for name in names for end, said in SUBJECTS.items() if name.endswith(end)]
    return f"{'; '.join(told)}." if told else ""


def _sentences(found: dict[Where, list[Row]], main: Where) -> list[str]:
    rows = [row for own in found.values() for row in own]
    said = [frontier_reading.seeds(rows).rstrip(":") + "."]
    for where, own in found.items():
        said.append(frontier_reading.described(where, own) if where != main else "")
        if where == main:
            said += [frontier_reading.frontier(own), frontier_reading.beside(own), frontier_reading.low_rank(own)]
        plain = found.get((where[0].removesuffix(frontier_reading.HARD), where[1]))
        if where[0].endswith(frontier_reading.HARD) and plain is not None:
            said.append(frontier_reading.hardship(own, plain))
    return said


def _lost(found: Mapping[Where, list[Row]]) -> str:
    """In how many comparisons at equal bits the best of ours loses to the best peer."""
    ratios = [
        over.mean
        for own in found.values()
        for bits in frontier_tables.RATES
        for ours, peer in [(best_at(own, OUR_SIDE, bits), best_at(own, PEER_SIDE, bits))]
        if ours is not None and peer is not None
        for over in [ratio(ours, peer)]
        if over is not None
    ]
    if not ratios:
        return ""
    worse = sum(over > 1 for over in ratios)
    return (
        f"Of {len(ratios)} comparisons at equal bits the best of ours loses more than the best peer in {worse}; its "
        f"loss is {frontier_tables.multiple(min(ratios))} to {frontier_tables.multiple(max(ratios))} times the peer's."
    )


def _picture(where: Where, rows: Sequence[Row], styled: dict[tuple[str, str], dict[str, Any]]) -> str:
    label = f"Loss against bits per element: {frontier_tables.title(where, rows)}"
    return svg.panel(
        partial(_draw, shown(summarise(rows)), any(row.kl_mean is not None for row in rows), styled), label
    )


def _draw(summaries: list[Summary], is_kl: bool, styled: dict[tuple[str, str], dict[str, Any]], axes: Any) -> None:
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for each in summaries:
        points.setdefault((each.side, each.family), []).append((each.bits or 0.0, each.loss or 0.0))
    for pair, own in points.items():
        axes.plot(*zip(*sorted(own), strict=True), **styled[pair])
    best = optimal(summaries)
    edge = sorted((each.bits or 0.0, each.loss or 0.0, each.cache) for each in summaries if each.cache in best)
    if edge:
        axes.plot(*list(zip(*edge, strict=True))[:2], color=svg.INK, lw=6, alpha=0.13, zorder=0, solid_capstyle="round")
    what = "KL to the uncompressed model, nats per token" if is_kl else "relative error of attention's output"
    axes.set(yscale="log", xlabel="bits per element, measured, with overheads", ylabel=what)
    left, right = axes.get_xlim()
    axes.set_xlim(max(0.0, left - 0.25 * (right - left)), right)  # room for the names
    svg.name_points(axes, [(at, lost, name) for at, lost, name in reversed(edge)])


def _equal(found: dict[Where, list[Row]]) -> Table:
    lines = []
    for where, own in found.items():
        for bits in frontier_tables.RATES:
            ours, peer = best_at(own, OUR_SIDE, bits), best_at(own, PEER_SIDE, bits)
            over = ratio(ours, peer) if ours is not None and peer is not None else None
            named = [
                cell
                for each in (ours, peer)
                for cell in (
                    ["-", "-"] if each is None else [each.family, frontier_tables.written(each.spread, "{:.2e}")]
                )
            ]
            if ours is not None or peer is not None:
                told = "-" if over is None else frontier_tables.told(over)
                lines.append([f"{where[0]}, {where[1]:,} tokens", f"{bits:g}", *named, told])
    headings = ["measured on", "bits/elem", "best of ours", "loss", "best peer", "loss", "ours / peer (over seeds)"]
    note = "Between the points of a family the logarithm of its loss is taken to run straight; nothing is extrapolated."
    return Table("The best of ours and the best peer at equal bits", markdown(headings, 6, lines), note=note)


def _all(where: Where, rows: Sequence[Row]) -> Table:
    caption = f"All caches: {frontier_tables.title(where, rows)}"
    return Table(caption, frontier_tables.table(rows), folded=True, note=frontier_tables.NOTES)
