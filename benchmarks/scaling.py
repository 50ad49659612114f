"""The job `python -m benchmarks scaling`: quality against bits, rank, context and position, fitted and not assumed.

It measures nothing: it reads the rows of `quality` (and `million`, where there are any), fits each family of codecs by
`scaling_fit`, and writes rows, a table, a picture, and the coefficients that `kvcompress plan` quotes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks import scaling_plot, scaling_tables
from benchmarks.log import open_log
from benchmarks.million_rows import MillionRow
from benchmarks.pareto import panels
from benchmarks.rows import Row
from benchmarks.scaling_fit import fit_line, fit_trend
from benchmarks.scaling_points import Measured, Points, families, parse, points, positions
from benchmarks.scaling_rows import ScalingRow
from kvcompress.fits import FamilyFit, Fits, Interval, Shape, Trend


@dataclass(frozen=True)
class Settings:
    """Where the measurements are: results.jsonl of `quality`, and of `million` (left out where there is none).

    subjects: of `quality`; the first one's fits are what `kvcompress plan` reads.
    """

    quality: Path = Path("benchmarks/results/quality/results.jsonl")
    million: Path = Path("benchmarks/results/million/results.jsonl")
    subjects: tuple[str, ...] = ("embedded", "embedded-hard")

    def __post_init__(self) -> None:
        if not self.subjects:
            raise ValueError("subjects must name at least one subject of quality, such as embedded")


@dataclass(frozen=True)
class Fitted:
    """A family's rows, and where it could be fitted its points and lines."""

    rows: tuple[ScalingRow, ...]
    points: Points | None = None
    fit: FamilyFit | None = None


def fit_family(
    subject: str, name: str, rows: Sequence[Row], base: dict[tuple[int, int], float], shape: Shape
) -> Fitted:
    """Both lines of a family; base: the uncompressed cache's perplexity by (context, seed)."""
    specs = {row.cache: row.spec for row in rows if row.spec is not None}
    row = ScalingRow(
        "bits", subject, name, caches=tuple(dict.fromkeys(r.cache for r in rows)), specs=(*specs.values(),)
    )
    try:
        found = points(rows, base, shape)
        fit = family_fit(name, found)
    except ValueError as error:
        return Fitted((replace(row, status="not fitted", reason=str(error)),))
    row = replace(
        row,
        kind=fit.kind,
        x=fit.x,
        contexts=tuple(sorted(set(found.contexts.tolist()))),
        reference=fit.reference,
        seeds=found.seeds,
        points=len(found.cells),
    )
    slope = fit.loss.coefficient(fit.kind).map(lambda value: math.exp(-value))
    growth = fit.loss.coefficient("doublings").map(math.exp) if "doublings" in fit.loss.terms else None
    bent = curvature(found)
    means = np.exp(np.log(found.losses).mean(0)).tolist()
    loss = replace(
        row,
        coefficients={term: ends(fit.loss.coefficient(term)) for term in fit.loss.terms},
        measured=tuple((*cell, kl) for cell, kl in zip(found.cells, means, strict=True)),
        base=ends(slope),
        four_inside=slope.holds(4) if fit.kind == "bits" else None,
        per_doubling=None if growth is None else ends(growth),
        curvature=None if bent is None else ends(bent),
        r_squared=fit.loss.r_squared,
        residual=math.exp(fit.loss.misfit),
    )
    perplexity = replace(
        row,
        kind="perplexity",
        x=(float(found.losses.min()), float(found.losses.max())),
        coefficients={"kl": ends(fit.perplexity.coefficient("kl"))},
        r_squared=fit.perplexity.r_squared,
        residual=fit.perplexity.misfit,
    )
    return Fitted((loss, perplexity), found, fit)


def ends(interval: Interval) -> tuple[float, float, float]:
    return astuple(interval)


def family_fit(name: str, found: Points) -> FamilyFit:
    """Raises ValueError where there are too few points or seeds."""
    contexts = sorted(set(found.contexts.tolist()))
    terms, columns = design(found, contexts[-1])
    seeds = len(found.seeds)
    loss = fit_line(terms, np.stack([columns] * seeds), np.log(found.losses))
    perplexity = fit_line(("kl",), found.losses[..., None], found.ratios)
    reach = float(found.x.min()), float(found.x.max())
    named = tuple(map(str, found.specs))
    return FamilyFit(name, found.kind, reach, (contexts[0], contexts[-1]), contexts[-1], named, loss, perplexity)


def design(found: Points, reference: int) -> tuple[tuple[str, ...], np.ndarray]:
    """Terms of ln KL, and their values [cells, terms]; no term for the context where there is only one."""
    columns = {"constant": np.ones(len(found.x)), "doublings": np.log2(found.contexts / reference), found.kind: found.x}
    if not columns["doublings"].any():
        del columns["doublings"]
    return tuple(columns), np.stack(list(columns.values()), 1)


def curvature(found: Points) -> Interval | None:
    """The coefficient of x squared, x from its middle; None for fewer than 4 values of x."""
    if len(set(found.x.tolist())) < 4:
        return None
    terms, columns = design(found, int(found.contexts.max()))
    bent = np.column_stack([columns, (found.x - found.x.mean()) ** 2])
    line = fit_line((*terms, "squared"), np.stack([bent] * len(found.seeds)), np.log(found.losses))
    return line.coefficient("squared")


def fit_positions(row: MillionRow, subject: str) -> tuple[ScalingRow, Trend | None]:
    """One cache's increase of perplexity against position; at positions where it was exactly 0 nothing was coded."""
    content = () if row.spec is None else (row.spec,)
    empty = ScalingRow("position", subject, row.cache, caches=(row.cache,), specs=content, seeds=(row.seed,))
    known = [(int(name), *pair) for name, pair in (row.increase_by_bucket or {}).items() if pair[1] > 0]
    try:
        at, values, errors = np.array(known, dtype=float).reshape(-1, 3).T
        last, step = fit_trend(np.log2(at / at.max(initial=1)), values, errors)
    except ValueError as error:
        return replace(empty, status="not fitted", reason=str(error)), None
    reach = int(at.min()), int(at.max())
    done = replace(
        empty, x=reach, reference=reach[1], points=len(at), coefficients={"at_end": ends(last), "doublings": ends(step)}
    )
    name = row.cache if row.spec is None else str(parse(row.spec))
    return done, Trend(name, reach, last, step)


def fit_all(settings: Settings) -> tuple[list[Fitted], list[ScalingRow], Fits]:
    """Every family of every subject, the rows by position, and the coefficients of the first subject.

    Raises OSError without rows of `quality`, ValueError where the first subject has no family that can be fitted.
    """
    measured = Measured.read(settings.quality)
    shape = measured.shape()
    fitted: list[Fitted] = []
    for (subject, _), _ in panels(measured.rows).items():
        if subject in settings.subjects and not any(f.rows[0].subject == subject for f in fitted):
            own = [row for row in measured.rows if row.subject == subject]
            pairs = [((r.context, r.seed), r.perplexity) for r in own if r.cache == "uncompressed"]
            base = {key: perplexity for key, perplexity in pairs if perplexity is not None}
            fitted += [fit_family(subject, name, rows, base, shape) for name, rows in families(own).items()]
    first = [f for f in fitted if f.fit is not None and f.rows[0].subject == settings.subjects[0]]
    if not first:
        raise ValueError(f"no family of {settings.subjects[0]!r} in {settings.quality} can be fitted")
    kept = [parse(spec) for spec in first[0].rows[0].specs]
    long, reader = positions(settings.million) if settings.million.exists() else ([], None)
    placed = [fit_positions(row, "million") for row in long]
    trends = tuple(trend for _, trend in placed if trend is not None)
    fits = Fits(
        measured.model or "the embedded model",
        shape,
        measured.text,
        measured.commits,
        kept[0].sinks,
        kept[0].window,
        kept[0].basis,
        tuple(f.fit for f in first if f.fit is not None),
        (reader or "the marathon model") if trends else None,
        trends,
    )
    return fitted, [row for row, _ in placed], fits


def run(settings: Settings, output: Path, console: Console, coefficients: Path | None = None) -> Fits:
    """Fit, and write results.jsonl, table.md and scaling.png into `output`, and fits.json there or as `coefficients`.

    Raises ValueError or OSError where there is nothing to fit.
    """
    fitted, along, fits = fit_all(settings)
    options = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}
    shared = {"model": None if fits.model == "the embedded model" else fits.model, "text": fits.text}
    log = open_log(output, "scaling", ScalingRow, shared, fresh=True, options=options, measured_at=fits.commits)
    for row in [row for each in fitted for row in each.rows] + along:
        log.add(row)
    table, picture = output / "table.md", output / "scaling.png"
    table.write_text(scaling_tables.document(log.rows, fits), "utf-8")
    chosen = [f for f in fitted if f.rows[0].subject == settings.subjects[0]]
    scaling_plot.plot(picture, [(f.points, f.fit) for f in chosen if f.points is not None and f.fit is not None], fits)
    target = output / "fits.json" if coefficients is None else coefficients
    target.write_text(fits.to_json(), "utf-8")
    console.print(scaling_tables.losses(log.rows, settings.subjects[0]), markup=False, soft_wrap=True)
    console.print(f"Written: {log.path}, {table}, {picture}, {target}", markup=False, soft_wrap=True)
    return fits
