"""Calibration on a text: how many bits every layer's keys and values get, under an average.

Each part of the cache is coded alone and what that does to the model's predictions is measured; bits are allotted so
that these losses add up to the least (kvcompress/budget.py). What comes of it is measured on other passages beside the
plain specs of the same average, and the best is taken; then so are other sinks and windows, paid for with fewer bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from kvcompress.budget import Part, allot, average, splits, to_spec
from kvcompress.codecs import Geometry
from kvcompress.divergence import Judge, Measured, Text
from kvcompress.learning import coded_from, find_parts
from kvcompress.spec import CODECS, CacheSpec, CodecSpec
from kvcompress.store import PAGE

SINKS = (0, 16, 64)  # tried beside the default
WINDOWS = (64, 256)
MARGIN = 0.02  # of the KL divergence: what other sinks or another window gain has to be more than the text's noise
MOST_BITS = 16  # a family whose numbers go beyond counts something else

Losses = Mapping[Part, Mapping[float, float]]
#: Told after every measurement: how many are done, of how many, and what it was.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Candidate:
    """A spec that was measured. numbers: of its codecs, by part; predicted: the sum of the parts' losses, in nats."""

    name: str
    spec: CacheSpec
    numbers: Mapping[Part, float]
    predicted: float
    measured: Measured

    @property
    def average(self) -> float:
        """Of the numbers, over all elements."""
        return average(self.numbers)


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found.

    losses: KL divergence in nats per token by part and number, each part coded alone and all others exact. candidates:
    what was compared on other passages, in the order measured; winner: the one of them to take.
    """

    losses: Losses
    candidates: tuple[Candidate, ...]
    winner: Candidate


def calibrate(
    model: PreTrainedModel,
    text: Text,
    bits: float = 3,
    codec: str = "trellis",
    *,
    heads: bool = False,
    context: int = 4096,
    count: int = 1,
    seed: int = 0,
    progress: Progress = lambda done, total, what: None,
) -> Calibration:
    """Allot an average of at most `bits` over all elements, whatever the context.

    codec: a codec without its last number (trellis, spectral, prerope+trellis), whose numbers are bits. heads: a number
    for each KV head. context: tokens of a passage, and where sinks and windows are compared at equal effective bits.
    count: passages to measure the parts on, and as many others to compare on; seed draws them. Raises ValueError for a
    family without such numbers, bits that it does not reach, a context that is too short to meet codes, or such a text.
    """
    numbers = choices(codec, bits)
    texts = text.passages(2 * count, context, seed)
    parts = find_parts(model, heads)
    plain = splits(parts, numbers, bits)
    total = len(parts) * len(numbers) + 1 + len(plain) + len(SINKS) + len(WINDOWS)
    search = _Search(model, codec, bits, total, progress)
    finest = numbered(codec, numbers[-1])
    begin = coded_from(model, CacheSpec(finest, finest, max(SINKS), max(WINDOWS)))
    search.take_losses(Judge(model, texts[::2], begin), parts, numbers)
    judge = Judge(model, texts[1::2], begin)
    search.try_numbers(judge, plain)
    for sinks in SINKS:
        search.try_ends(judge, sinks, search.winner.spec.window)
    for window in WINDOWS:
        search.try_ends(judge, search.winner.spec.sinks, window)
    return Calibration(search.losses, tuple(search.candidates), search.winner)


def choices(codec: str, bits: float) -> list[float]:
    """The numbers of a codec's last family, coarsest first; raises ValueError where they do not serve for `bits`."""
    name = codec.rpartition("+")[2].strip()
    numbers = sorted(CODECS[name].bits)
    if not numbers or numbers[-1] > MOST_BITS:
        why = "takes no number" if not numbers else "is numbered by ranks, which --energy chooses"
        raise ValueError(
            f"no bits to allot in {codec!r}: {name!r} {why}; trellis, spectral or prerope+trellis have some"
        )
    numbered(codec, numbers[0])  # raises for what stands before the last name
    if not numbers[0] <= bits <= numbers[-1]:
        raise ValueError(f"bits must be within {numbers[0]:g} and {numbers[-1]:g} for {codec!r}, got {bits:g}")
    return numbers


def numbered(codec: str, number: float) -> CodecSpec:
    """A codec of which the last number was left out, with it."""
    return CodecSpec.parse(f"{codec}{number:g}")


class _Search:
    """The measurements of one calibration, and the best spec so far."""

    losses: Losses
    winner: Candidate

    def __init__(self, model: PreTrainedModel, codec: str, bits: float, total: int, progress: Progress):
        self.codec, self.bits, self.total, self.progress = codec, bits, total, progress
        self.element_bits = 8 * model.dtype.itemsize
        self.done = 0
        self.candidates: list[Candidate] = []

    def take_losses(self, judge: Judge, parts: list[Part], numbers: list[float]) -> None:
        """Measure every number of every part, all others exact."""
        losses: dict[Part, dict[float, float]] = {part: {} for part in parts}
        for part, own in losses.items():
            others = {other: self._beside(part, other, numbers[-1]) for other in parts}
            for number in numbers:
                spec = to_spec(others | {part: numbered(self.codec, number)}, CacheSpec())
                own[number] = judge.measure(spec).kl
                self._advance(f"{part}, {number:g} bits")
        self.losses = losses

    def _beside(self, part: Part, other: Part, finest: float) -> CodecSpec:
        """The codec of another part while one is measured: none, but heads of a layer have to share a frame of RoPE.

        Where `exact` is in another, they get the finest number, which adds the same to all of the part's losses.
        """
        fine = numbered(self.codec, finest)
        alike = (part.layer, part.side) == (other.layer, other.side)
        if part.head is not None and alike and fine.build(Geometry(part.elements, part.side)).frame != "fixed":
            return fine
        return CodecSpec("exact")

    def try_numbers(self, judge: Judge, plain: list[dict[Part, float]]) -> None:
        """Measure what the losses suggest, and the plain alternatives; the best of them wins."""
        self._add(judge, "allotted", allot(self.losses, self.bits), CacheSpec())
        for numbers in plain:
            key, value = (next(n for part, n in numbers.items() if part.side == side) for side in (0, 1))
            name = f"{self.codec}{key:g}" if key == value else f"{self.codec}:k{key:g}v{value:g}"
            self._add(judge, name, numbers, CacheSpec())
        self.winner = min(self.candidates, key=lambda each: each.measured.kl)

    def try_ends(self, judge: Judge, sinks: int, window: int) -> None:
        """Measure other sinks or another window, and as many bits less as they cost; it wins where that is better."""
        best = self.winner
        bits = self._affordable(judge.context, sinks, window)
        what = f"sinks={sinks},window={window}"
        if bits < average({part: min(own) for part, own in self.losses.items()}):
            self._advance(what)  # dearer than all bits that could be saved
            return
        numbers = best.numbers if bits >= best.average else allot(self.losses, bits)
        found = self._add(judge, what, numbers, replace(best.spec, sinks=sinks, window=window))
        if found.measured.kl < (1 - MARGIN) * best.measured.kl:
            self.winner = found

    def _affordable(self, context: int, sinks: int, window: int) -> float:
        """The average, at most `bits`, that makes a cache of about `context` tokens as large as the best one so far."""
        best = self.winner
        overhead = best.measured.bits - best.average
        before, after = (
            context - PAGE / 2 - own for own in (best.spec.sinks + best.spec.window, sinks + window)
        )  # coded tokens: on average half a page is not full yet
        if after <= 0:
            return 0.0
        return min(self.bits, (before * best.measured.bits + (after - before) * self.element_bits) / after - overhead)

    def _add(self, judge: Judge, name: str, numbers: Mapping[Part, float], base: CacheSpec) -> Candidate:
        spec = to_spec({part: numbered(self.codec, number) for part, number in numbers.items()}, base)
        predicted = sum(self.losses[part][number] for part, number in numbers.items())
        known = next((each.measured for each in self.candidates if each.spec == spec), None)
        measured = known or judge.measure(spec)
        self.candidates.append(Candidate(name, spec, dict(numbers), predicted, measured))
        self._advance(name)
        return self.candidates[-1]

    def _advance(self, what: str) -> None:
        self.done += 1
        self.progress(self.done, self.total, what)
