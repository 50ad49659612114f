"""The caches that are compared: the uncompressed one, ours by spec, and transformers' QuantizedCache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel, QuantizedCache
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from kvcompress import CacheSpec, CompressedCache

#: What `quick` measures of ours.
SPECS = ("exact", "fp8", "lloyd4", "lloyd3", "lloyd2", "trellis4", "trellis3", "trellis2", "trellis:k4v2")

#: QuantizedCache's backends with the bits to measure, whether each is installed, and the package that brings it.
BACKENDS: dict[str, tuple[tuple[int, ...], Callable[[], bool], str]] = {
    "quanto": ((4, 2), is_optimum_quanto_available, "optimum-quanto"),
    "hqq": ((4, 3, 2), is_hqq_available, "hqq"),
}


@dataclass(frozen=True)
class Contender:
    """One cache to measure.

    make: an empty cache for a model's config. attention: the implementation that it needs, None for the model's own.
    missing: why it cannot run here, None where it can.
    """

    name: str
    library: str
    make: Callable[[PretrainedConfig], Cache]
    attention: str | None = None
    spec: CacheSpec | None = None
    missing: str | None = None

    @contextmanager
    def attending(self, model: PreTrainedModel) -> Iterator[None]:
        """Within it the model attends as this cache wants it to; its own way is restored afterwards."""
        own = model.config._attn_implementation
        if self.attention is not None:
            model.set_attn_implementation(self.attention)
        try:
            yield
        finally:
            model.set_attn_implementation(own)


UNCOMPRESSED = Contender("uncompressed", "transformers", lambda config: DynamicCache(config=config))


def compressed(text: str) -> Contender:
    """Our cache under the spec `text`; raises ValueError where that is none."""
    spec = CacheSpec.parse(text)
    return Contender(text, "kvcompress", lambda config: CompressedCache(config, spec), "kvcompress", spec)


def quantized(backend: str, bits: int) -> Contender:
    """QuantizedCache with groups of 64 and 128 exact recent tokens, axis 0: the one axis that takes every bit count.

    It keeps scales and zeros in the model's dtype: 1 bit an element in float32, half a bit in 16 bits.
    """

    def make(config: PretrainedConfig) -> Cache:
        return QuantizedCache(
            backend, config, nbits=bits, axis_key=0, axis_value=0, q_group_size=64, residual_length=128
        )

    _, installed, package = BACKENDS[backend]
    missing = None if installed() else f"{package} is not installed"
    return Contender(f"QuantizedCache {backend}{bits}", "transformers", make, missing=missing)


def contenders(specs: Sequence[str] = SPECS, baselines: bool = True) -> list[Contender]:
    """The uncompressed cache first, then ours, then, where wanted, every QuantizedCache."""
    others = [quantized(backend, bits) for backend, (choices, _, _) in BACKENDS.items() for bits in choices]
    return [UNCOMPRESSED, *map(compressed, specs), *(others if baselines else [])]
