"""Least squares for `python -m benchmarks scaling`, seed by seed.

Why not a bootstrap over seeds: of three seeds it has ten different samples, and even its widest interval, from the
lowest to the highest seed, holds the truth in three of four cases only. Student's t over the seeds' own fits is exact
for normal noise whatever their number (`pytest tests/test_scaling.py -k covers`).
"""

from __future__ import annotations

import numpy as np

from kvcompress.fits import Interval, Line, quantile

LEAST_SEEDS, LEAST_X = 2, 3


def fit_line(terms: tuple[str, ...], designs: np.ndarray, responses: np.ndarray) -> Line:
    """designs [seeds, points, terms], responses [seeds, points], the same points in every seed.

    Raises ValueError for too few seeds, or no more points than terms.
    """
    seeds, points, count = designs.shape
    if seeds < LEAST_SEEDS:
        raise ValueError(f"{seeds} seed: {LEAST_SEEDS} or more are needed for an interval")
    if points <= count:
        raise ValueError(f"{points} points for {count} coefficients: {count + 1} or more are needed to judge the fit")
    each = np.stack([np.linalg.lstsq(x, y, rcond=None)[0] for x, y in zip(designs, responses, strict=True)])
    found, x, y = each.mean(0), designs.mean(0), responses.mean(0)
    left = y - x @ found
    spread = y - y.mean() if "constant" in terms else y  # a line through the origin explains squares, not variance
    return Line(
        terms,
        tuple(found.tolist()),
        tuple(map(tuple, np.cov(each.T, ddof=1).reshape(count, count).tolist())),
        tuple(map(tuple, np.linalg.inv(x.T @ x).tolist())),
        seeds,
        float(np.sqrt(left @ left / (points - count))),
        points - count,
        float(1 - left @ left / (spread @ spread)),
    )


def fit_trend(doublings: np.ndarray, values: np.ndarray, errors: np.ndarray) -> tuple[Interval, Interval]:
    """A line through points with standard errors: its value at doublings = 0, and what each doubling adds.

    Intervals by Student's t; errors are scaled up where the points scatter more than they say. Raises ValueError for
    fewer than LEAST_X points.
    """
    if len(values) < LEAST_X:
        raise ValueError(f"{len(values)} positions: {LEAST_X} or more are needed")
    x = np.stack([np.ones_like(doublings), doublings], 1) / errors[:, None]
    y = values / errors
    inverse, freedom = np.linalg.inv(x.T @ x), len(y) - 2
    found = inverse @ x.T @ y
    scale = max(1.0, float(((y - x @ found) ** 2).sum() / freedom))
    half = quantile(freedom) * np.sqrt(np.diag(inverse) * scale)
    at, step = (Interval(float(m), float(m - h), float(m + h)) for m, h in zip(found, half, strict=True))
    return at, step
