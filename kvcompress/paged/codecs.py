"""Which specs a paged cache can have, whose slots are given to single tokens in any order, and a layer's codecs."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from kvcompress import basis as bases
from kvcompress.basis import Basis
from kvcompress.codecs import SIDES, Fit, Geometry
from kvcompress.records import TokenCodec
from kvcompress.spec import CacheSpec

#: Of the specs under 4 bits that need no basis, the one of least KL by `python -m benchmarks.token_records`.
DEFAULT = "trellis:k4v3"


def parse(text: str, given: str) -> CacheSpec:
    """A spec of pages of single tokens; given: how it was said, for errors.

    Raises ValueError for one that such a cache cannot have: with sinks, a window, layers of their own, or a basis that
    would be learned from prompts.
    """
    spec, usual = CacheSpec.parse(text), CacheSpec()
    if (spec.sinks, spec.window) not in ((usual.sinks, usual.window), (0, 0)):
        raise ValueError(f"{given}: pages of a paged cache hold every token as codes, leave out sinks= and window=")
    if spec.layers:
        raise ValueError(f"{given}: pages of a paged cache are alike in all layers, leave out layerN=")
    if spec.basis == "shared":
        raise ValueError(f"{given}: nothing is learned from prompts, basis can only be a .safetensors file")
    return spec


def codecs(
    spec: CacheSpec, head_dim: int, heads: int, dtype: torch.dtype, layer: int | None = None
) -> tuple[TokenCodec, TokenCodec]:
    """Of keys and of values of a layer with `heads` KV heads, on the CPU; of any layer where none is named.

    Raises ValueError for codecs that cannot code tokens one by one, and for a basis that is not of such a layer.
    """
    fits: tuple[Fit, Fit] = ({}, {})
    if spec.basis != "prompt":
        fits = _basis(spec, layer).fits
    own = (spec.key, spec.value)
    for side, fit in enumerate(fits):
        known = {x.shape[1] for x in fit.values()}
        if known - {heads, 1}:
            raise ValueError(
                f"{spec.basis} was learned of {max(known)} heads of {SIDES[side]}s, there are {heads} here: "
                "tensor parallelism goes without basis="
            )
    key, value = (
        TokenCodec.of(codec, Geometry(head_dim, side, heads), dtype, fits[side]) for side, codec in enumerate(own)
    )
    return key, value


@lru_cache(maxsize=4)
def _layers(path: str, written: int) -> dict[int, Basis]:
    """Of a file as it was `written`, in nanoseconds: it may have been learned again since."""
    return bases.load(path)


def _basis(spec: CacheSpec, layer: int | None) -> Basis:
    path = Path(spec.basis)
    layers = _layers(spec.basis, path.stat().st_mtime_ns if path.is_file() else 0)  # 0: loading says what is wrong
    layer = min(layers) if layer is None else layer
    if layer not in layers:
        raise ValueError(f"{spec.basis} holds no basis of layer {layer}, only of {sorted(layers)}")
    layers[layer].check(layer, (str(spec.key), str(spec.value)))
    return layers[layer]
