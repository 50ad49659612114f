"""Rows of `python -m benchmarks scaling`: one a kind of line, subject and family of codecs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Ends = tuple[float, float, float]


@dataclass(frozen=True)
class ScalingRow:
    """status: "ok", or "not fitted" with a `reason`.

    kind: "bits" or "rank", where ln KL is fitted; "perplexity", where ln(perplexity over the uncompressed one) is
    fitted against KL; "position", the increase of perplexity in per cent against doublings of position. x: the range of
    bits (codes with their scales), of ranks, of KL or of positions; contexts in tokens. coefficients: value and the
    ends of its 95% interval, by term: `doublings` of context above `reference` tokens.
    base: by what KL falls with each bit, or each direction; four_inside: whether 4 lies in its interval (bits only).
    curvature: the coefficient of x squared beside the line's, None where there are too few x. per_doubling: by what KL
    grows with each doubling of context. residual: the standard deviation of points (means over seeds) from the line,
    as a factor of KL for "bits" and "rank". seeds: of `quality`. measured: where ln KL is fitted, x, context and the
    KL in nats that the line was put through, the geometric mean over the seeds.
    """

    kind: str
    subject: str
    family: str
    status: str = "ok"
    reason: str | None = None
    x: tuple[float, float] | None = None
    contexts: tuple[int, ...] | None = None
    reference: int | None = None
    caches: tuple[str, ...] = ()
    specs: tuple[dict[str, Any], ...] = ()
    seeds: tuple[int, ...] = ()
    points: int | None = None
    measured: tuple[tuple[float, int, float], ...] = ()
    coefficients: dict[str, Ends] | None = None
    base: Ends | None = None
    four_inside: bool | None = None
    per_doubling: Ends | None = None
    curvature: Ends | None = None
    r_squared: float | None = None
    residual: float | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kind, self.subject, self.family
