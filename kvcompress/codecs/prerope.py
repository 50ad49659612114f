"""`prerope+CODEC`: keys coded as they were before their rotary position embedding, and rotated when they are read.

Before RoPE keys vary with the text only, not with their position: fewer directions hold their energy (KVQuant, arXiv
2401.18079; ShadowKV, arXiv 2410.21465). In exchange attention rebuilds and rotates keys tile by tile, since a query can
not absorb a rotation that differs from token to token. Values, which have no RoPE, are coded as CODEC says.
"""

from __future__ import annotations

from dataclasses import replace

from kvcompress.codecs import Codec, Geometry, register
from kvcompress.spec import CodecSpec


@register("prerope", parts=(1,), examples=("prerope+trellis3",))
def build(spec: CodecSpec, geometry: Geometry) -> Codec:
    (part,) = spec.parts
    if part.name == "exact":
        raise ValueError(f"{spec}: keys that are stored exactly are no better off before their RoPE; write exact")
    codec = part.build(geometry)
    return codec if geometry.side else replace(codec, frame="token")
