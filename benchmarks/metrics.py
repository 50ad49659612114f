"""What the suite measures, by the names that rows have for it: which way is better, and how far it moves by itself.

What is counted (bytes, bits, instructions) moves not at all. Quality on the same tokens moves by rounding, which
differs from machine to machine, and with it by a few flipped choices. Times move with whatever else the machine does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Comparable(Enum):
    """Between which rows a metric can be compared at all."""

    ALWAYS = ""
    SAME_DEVICE = "device threads"
    SAME_MACHINE = "device threads cores platform"

    def differing(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
        """What of two lines' environments stands in the way."""
        return [name for name in self.value.split() if old.get(name) != new.get(name)]


@dataclass(frozen=True)
class Metric:
    """One measure. Its noise is a factor of 1 + `relative` either way, and `absolute`, in its own unit."""

    higher_is_better: bool
    relative: float = 0.0
    absolute: float = 0.0
    comparable: Comparable = Comparable.ALWAYS

    def noise(self, old: float, new: float, tolerance: float = 1.0) -> float:
        """The largest difference between two values that is noise; tolerance: a factor on both bounds.

        A fall by a factor is a smaller difference than a rise by it: so a speed can fall out of the widest bounds.
        """
        factor = self.relative * tolerance
        share = factor if abs(new) > abs(old) else factor / (1 + factor)
        return share * abs(old) + self.absolute * tolerance


#: A sum of floats in another order.
ROUNDING = 1e-9

FEWER = Metric(False)
BITS = Metric(False, ROUNDING)
TIME = Metric(False, 0.3, 0.0, Comparable.SAME_MACHINE)
SPEED = Metric(True, 0.3, 0.0, Comparable.SAME_MACHINE)
SLOWDOWN = Metric(False, 0.2, 0.0, Comparable.SAME_DEVICE)
SPEEDUP = Metric(True, 0.2, 0.0, Comparable.SAME_DEVICE)
SHARE = Metric(True, 0.0, 0.05)

#: Metrics by the pattern that their whole name has; the first that fits counts.
METRICS: tuple[tuple[str, Metric], ...] = (
    (r"bytes|cache_bytes|cache|(memory|disk|device|host|page|held)_bytes|cache_at_end", FEWER),
    (r"(prefill|step)_payload|step_collectives", FEWER),
    (r"peak|peak(_memory)?_bytes", Metric(False, 0.1)),  # the allocator's part in it varies
    (r"(effective_)?bits_per_element", BITS),
    (r"compression", Metric(True, ROUNDING)),
    (r"perplexity(_by_\w+)?", Metric(False, 0.005)),
    (r"kl_mean", Metric(False, 0.05, 1e-6)),  # below 1e-6 lies the rounding of exact caches
    (r"kl_p99", Metric(False, 0.1, 1e-6)),
    (r"output_error", Metric(False, 0.05)),
    (r"capacity(_ratio)?", Metric(True, ROUNDING)),
    (r"(greedy|repeated|top)_share|same_first_token", SHARE),
    (r"tokens_reused", Metric(True)),
    (r"difference", Metric(False, 1.0, 1e-6)),  # of sums in another order, down to the rounding of float32
    (r"lost", FEWER),
    (r"rss_mean", Metric(False, 0.1)),
    (r"(rss|cache)_slope", Metric(False, 0.0, 2.0**20)),  # bytes a minute; allocators move by that much
    (r"logprob_magnitude", Metric(False, 0.05)),
    (r"trellis|lloyd", Metric(False, 0.01)),  # their errors on Gaussians
    (r"top1_agreement", Metric(True, 0.0, 0.005)),
    (r"(\w+_)?recall(_by_\w+)?", SHARE),
    (r"greedy_tokens", Metric(True, 0.1, 2.0)),  # one flipped choice ends a path
    (
        r"step_milliseconds|step_seconds|milliseconds_per_token|time_to_first_token_seconds"
        r"|seconds_(without|memory|disk)|(device|kernel|host|step|keys|values)_us",
        TIME,
    ),
    (r"(\w+_)?tokens_per_second|bytes_per_second|tflops", SPEED),
    (r"step_ratio|first_token_ratio", SLOWDOWN),
    (r"ratio|kernel_ratio|speed_of_flash|speed_of_best|share_of_copy", SPEEDUP),  # of `gpu`: of a baseline's speed
    (r"spills|shared_bytes|i2f", FEWER),
    (r"lane_instructions_per_element", Metric(False, 0.01)),
    (r"registers", Metric(False, 0.0, 7.0)),  # they are given out in eights
)

#: Numbers of rows that are no measure of better or worse: what was asked for, and what follows from other fields.
NEUTRAL = re.compile(
    r"scored\w*|(\w+_)?questions|seconds|first_seconds|repetitions|uncompressed(_bytes)?|bfloat16_bytes|increase_by_\w+"
    r"|error|allowed|largest|distortion\w*|coded_tokens|sets|pages|programs|identical|\w+_q[13]|\w+_spread_us|mean_us"
    r"|bound|cached|logprob_mean|slowest_us|busy_us|kernels\w*|share_of_prefill|num_warps|num_stages|elements|shared_limit|loop_instructions"
    r"|unrolled|cores|threads|samples|prefix_hits|cache_peak|\w+_(low|high)|layer_tokens_per_second|parameters|minutes|coded|cut|groups|heads|queries|softcap"
)


def find(name: str) -> Metric | None:
    """The metric of a field, None where it is none."""
    return next((metric for pattern, metric in METRICS if re.fullmatch(pattern, name)), None)


def known(name: str) -> bool:
    """Whether a number of this name is a metric, or known not to be one."""
    return find(name) is not None or NEUTRAL.fullmatch(name) is not None


def values(row: Mapping[str, Any]) -> dict[str, tuple[Metric, float]]:
    """The metrics of a row with their values; one that is a mapping or list gives one for each of its numbers."""
    found = {}
    for name, held in row.items():
        metric = find(name)
        if metric is not None:
            for label, value in parts(name, held):
                found[label] = (metric, value)
    return found


def parts(name: str, held: Any) -> list[tuple[str, float]]:
    if isinstance(held, Mapping):
        return [pair for key, value in held.items() for pair in parts(f"{name}[{key}]", value)]
    if isinstance(held, (list, tuple)):
        return [pair for index, value in enumerate(held) for pair in parts(f"{name}[{index}]", value)]
    return [(name, float(held))] if is_number(held) else []


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def spread(row: Mapping[str, Any], name: str) -> float:
    """Half the distance between a metric's quartiles (or whatever range the row gives for it), 0 where it gives none.

    Two medians further apart than the sum of theirs have ranges that, even to both sides, do not meet.
    """
    slope = name.removesuffix("_slope")
    pairs = (
        row.get(f"{name.removesuffix('_us')}_spread_us"),
        [row.get(f"{name}_q1"), row.get(f"{name}_q3")],
        [row.get(f"{slope}_low"), row.get(f"{slope}_high")],
    )
    ends: list[Any] = next((pair for pair in pairs if pair and None not in pair), [])
    numbers = [float(end) for end in ends if is_number(end)]
    return (numbers[1] - numbers[0]) / 2 if len(numbers) == 2 else 0.0
