"""The caches that are compared: the uncompressed one, ours and the peers' methods by spec, and QuantizedCache.

`SPECS` is what `quick` measures. `OURS`, `PEERS` and `BACKENDS` are the lists of `python -m benchmarks quality`: edit
them there. A name that the registry does not know is no error in these lists, it gives a row that says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel, QuantizedCache
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from kvcompress import CacheSpec, CompressedCache

#: What `quick` measures of ours.
SPECS = (
    "exact",
    "fp8",
    "lloyd3",
    "trellis3",
    "spectral3",
    "prerope+spectral4",
    "prerope+spectral3",
    "prerope+spectral2",
)

#: Ours by family (what is joined to one curve, and interpolated along): the specs, with spaces between.
OURS: dict[str, str] = {
    "exact": "exact",
    "lloyd": "lloyd2 lloyd3 lloyd4",
    "trellis": "trellis1 trellis2 trellis3 trellis4",
    "trellis k>v": "trellis:k4v2",
    "trellis auto": "trellis:auto3",
    "spectral": "spectral1.5 spectral2 spectral2.5 spectral3 spectral4",
    "pre-RoPE spectral": " ".join(f"prerope+spectral{bits}" for bits in (1.5, 2, 2.5, 3, 3.5, 4)),
    "pre-RoPE trellis": "prerope+trellis3",
    "low rank": "lowrank8 lowrank16 lowrank32",
    "pre-RoPE low rank": "prerope+lowrank16 prerope+lowrank32",
    "low rank + trellis": "lowrank48+trellis3 lowrank48+trellis4",
    "pre-RoPE low rank + trellis": "prerope+lowrank32+trellis4 prerope+lowrank48+trellis4",
    "joint low rank + trellis": "jointrank96+trellis4",
    "residual + trellis": "residual4+trellis2",
}

#: The peers' methods, by family as above. All run in our cache, so with the same exact sinks and window as ours.
PEERS: dict[str, str] = {
    "TurboQuant": "turboquant1 turboquant2 turboquant3 turboquant4",
    "KIVI": "kivi2 kivi4",
    "KVQuant": "kvquant2 kvquant3 kvquant4",
    "KVarN": "kvarn2 kvarn3 kvarn4",
    "KVarN k>v": "kvarn:k4v2",
    "NF4": "nf4",
    "bnb 8 bits": "bnb8",
    "fp8": "fp8",
}

#: QuantizedCache's backends with the bits to measure, whether each is installed, and the package that brings it.
BACKENDS: dict[str, tuple[tuple[int, ...], Callable[[], bool], str]] = {
    "quanto": ((4, 2), is_optimum_quanto_available, "optimum-quanto"),
    "hqq": ((4, 3, 2), is_hqq_available, "hqq"),
}

#: The sides that a contender is on.
REFERENCE, OUR_SIDE, PEER_SIDE = "reference", "ours", "peer"


@dataclass(frozen=True)
class Contender:
    """One cache to measure.

    make: an empty cache for a model's config. attention: the implementation that it needs, None for the model's own.
    missing: why it cannot run here, None where it can; `lack` says in two words what kind of reason that is.
    side, family: whose method it is, and the curve that it belongs to.
    """

    name: str
    library: str
    make: Callable[[PretrainedConfig], Cache]
    attention: str | None = None
    spec: CacheSpec | None = None
    missing: str | None = None
    lack: str = "not installed"
    side: str = REFERENCE
    family: str = ""

    @property
    def content(self) -> dict[str, Any] | None:
        """The spec as JSON has it; None for a cache that has none."""
        return None if self.spec is None else json.loads(self.spec.to_json())

    @property
    def labels(self) -> dict[str, Any]:
        """What it is, by the names that rows of results have for that."""
        return {
            "cache": self.name,
            "side": self.side,
            "family": self.family or self.name,
            "library": self.library,
            "spec": self.content,
        }

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


def compressed(text: str, window: int | None = None) -> Contender:
    """Our cache under the spec `text`, with a window of `window` tokens where the spec itself sets none (None: as is).

    Raises ValueError where `text` is no spec.
    """
    spec = CacheSpec.parse(text)
    if window is not None and "window=" not in text and spec.window == CacheSpec().window:
        spec = replace(spec, window=window)
    side, family = _place(text)
    make = _Compressed(spec)
    return Contender(text, "kvcompress", make, "kvcompress", spec, side=side, family=family)


@dataclass(frozen=True)
class _Compressed:
    spec: CacheSpec

    def __call__(self, config: PretrainedConfig) -> Cache:
        return CompressedCache(config, self.spec)


def quantized(backend: str, bits: int, window: int = 128) -> Contender:
    """QuantizedCache with groups of 64 and `window` exact recent tokens, axis 0: the one axis for every bit count.

    It keeps scales and zeros in the model's dtype: 1 bit an element in float32, half a bit in 16 bits.
    """

    def make(config: PretrainedConfig) -> Cache:
        return QuantizedCache(
            backend, config, nbits=bits, axis_key=0, axis_value=0, q_group_size=64, residual_length=window
        )

    _, installed, package = BACKENDS[backend]
    missing = None if installed() else f"{package} is not installed"
    family = f"QuantizedCache {backend}"
    return Contender(f"{family}{bits}", "transformers", make, missing=missing, side=PEER_SIDE, family=family)


def quantized_caches(window: int = 128) -> list[Contender]:
    """Every backend of QuantizedCache at each of its bits."""
    return [quantized(backend, bits, window) for backend, (choices, _, _) in BACKENDS.items() for bits in choices]


def contenders(specs: Sequence[str] = SPECS, baselines: bool = True) -> list[Contender]:
    """What `quick` measures: the uncompressed cache, then ours, then, where wanted, every QuantizedCache."""
    return [UNCOMPRESSED, *map(compressed, specs), *(quantized_caches() if baselines else [])]


def field(specs: Sequence[str] | None, peers: bool, window: int | None = None) -> list[Contender]:
    """What `quality` measures: the uncompressed cache, `specs` (None: all of OURS), then PEERS and QuantizedCache.

    window: exact recent tokens of those that do not say otherwise (None: 128). Raises ValueError for a wrong name among
    `specs`; a name of the lists that is not known is a contender that is missing.
    """
    ours = _listed(OURS, window) if specs is None else [compressed(text, window) for text in specs]
    others = [*_listed(PEERS, window), *quantized_caches(window or 128)] if peers else []
    return list({each.name: each for each in [UNCOMPRESSED, *ours, *others]}.values())


def _listed(families: Mapping[str, str], window: int | None) -> list[Contender]:
    return [_if_known(text, window) for specs in families.values() for text in specs.split()]


def _if_known(text: str, window: int | None) -> Contender:
    try:
        return compressed(text, window)
    except ValueError as error:
        side, family = _place(text)
        reason = "no codec of this name is registered" if "unknown codec" in str(error) else str(error)
        return Contender(
            text, "kvcompress", UNCOMPRESSED.make, missing=reason, lack="not known", side=side, family=family
        )


def _place(text: str) -> tuple[str, str]:
    """The side and family of a spec: those of the lists, else its codec's side and its name without its bits."""
    bare, _, settings = text.partition(",")
    rest = f",{settings}" if settings else ""
    for side, families in ((PEER_SIDE, PEERS), (OUR_SIDE, OURS)):
        for family, specs in families.items():
            if bare in specs.split():
                return side, family + rest
    peers = {_codec(spec) for specs in PEERS.values() for spec in specs.split()}
    name = re.sub(r":k.*", " k>v", bare) if ":k" in bare else bare.rstrip("0123456789.")
    return PEER_SIDE if _codec(bare) in peers else OUR_SIDE, name + rest


def _codec(spec: str) -> str:
    """The name that a spec begins with: trellis of trellis3, of trellis:k4v2."""
    return re.split(r"[\d:+=]", spec, maxsplit=1)[0]
