"""What quality a spec is expected to keep, in words, from the lines of `kvcompress.fits`, and how far these reach.

Nothing is extrapolated. For another model the figure of the fitted one is quoted as that model's; for a context outside
the fitted ones the nearest of them is quoted as that context's; for bits outside, or a family without a fit, there is
no figure, and the words say why.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcompress.fits import Fits, Interval, Shape, Trend, family_of, x_of
from kvcompress.spec import CacheSpec

MEASURE = "python -m benchmarks quality --model MODEL, python -m benchmarks scaling, then kvcompress plan --fits FILE"


@dataclass(frozen=True)
class Expectation:
    """kl: nats a token; perplexity: its increase as a share; both with the 95% interval of one more document, and None
    where nothing is claimed. context: the tokens that they hold for; words: all of it, one sentence an entry."""

    kl: Interval | None
    perplexity: Interval | None
    context: int | None
    words: tuple[str, ...]


def expect(spec: CacheSpec, context: int, shape: Shape | None, fits: Fits) -> Expectation:
    """For a spec on a model of that shape (None: it has no layer to compress), at so many tokens of context."""
    known = family_of(spec)
    if shape is None:
        return Expectation(None, None, None, ("quality: no layer is compressed, nothing is lost",))
    if spec.key.name == spec.value.name == "exact" and not spec.layers:
        return Expectation(None, None, None, ("quality: exact codes lose nothing",))
    fit = None if known is None else fits.family(known[0])
    if known is None or fit is None:
        name = "a spec whose keys, values, layers or heads differ" if known is None else f"the family {known[0]!r}"
        fitted = ", ".join(each.family for each in fits.families)
        return Expectation(None, None, None, (f"quality: no fit for {name}; families with one: {fitted}",))
    x = x_of(spec, known[1], fits.shape)
    at = f"{x:.2f} bits" if known[1] == "bits" else f"rank {x:.0f}"
    low, high = fit.x
    reach = f"{low:.2f} to {high:.2f} bits" if known[1] == "bits" else f"ranks {low:.0f} to {high:.0f}"
    if not low <= x <= high:
        return Expectation(
            None, None, None, (f"quality: {at} lie outside the fitted {reach} of {fit.family}: no figure is given",)
        )
    near = min(max(context, fit.contexts[0]), fit.contexts[1])
    kl, perplexity = fit.expected(x, near)
    words = [
        f"quality{_reach(spec, shape, fits)}: at {at} and {near:,} tokens expect KL {kl.mean:.1e} nats a token "
        f"({kl.low:.1e} to {kl.high:.1e}) and perplexity {perplexity.mean:+.2%} ({perplexity.low:+.2%} to "
        f"{perplexity.high:+.2%}{', not told apart from none' if perplexity.holds(0) else ''}); 95% intervals of one "
        f"document. Fitted on {fits.model} and {fits.text}: {fit.family}, {reach}, {fit.contexts[0]:,} to "
        f"{fit.contexts[1]:,} tokens"
    ]
    if near != context:
        words.append(f"no quality is claimed at {context:,} tokens: they lie outside the fitted contexts")
    if shape != fits.shape:
        words.append(f"for this model's own figures: {MEASURE}")
    return Expectation(kl, perplexity, near, (*words, *(_along(t, fits) for t in fits.trends if t.spec == str(spec))))


def _reach(spec: CacheSpec, shape: Shape, fits: Fits) -> str:
    """In what the figures are not of this model or this spec; nothing where they are."""
    parameters = f"{fits.shape.parameters:,} parameters, heads of {fits.shape.dims[0]}"
    other = [f"of another model than this one, which has no fit ({parameters})"] if shape != fits.shape else []
    fitted = {name: getattr(fits, name) for name in ("sinks", "window", "basis")}
    apart = [f"{name}={value}" for name, value in fitted.items() if value != getattr(spec, name)]
    other += [f"for {', '.join(apart)}, which this spec does not have"] if apart else []
    return " " + ", and ".join(other) if other else ""


def _along(trend: Trend, fits: Fits) -> str:
    end, step = trend.at_end, trend.doubling
    return (
        f"along one document on {fits.trends_model}, positions {trend.positions[0]:,} to {trend.positions[1]:,}, this "
        f"spec raised perplexity by {end.mean:.2f}% at its end ({end.low:.2f} to {end.high:.2f}), each doubling of the "
        f"position by {step.mean:+.3f} ({step.low:+.3f} to {step.high:+.3f})"
    )
