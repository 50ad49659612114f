"""`spectral1.5`..`spectral4`: centre, balance, band, trellis.

The balanced components of a head (codecs/balanced.py) fall into bands, strongest first, with bits of their own, so that
strong components are coded finely and the weakest coarsely or not at all (transform coding; bits by reverse
water-filling). Every band is coded by the trellis with a gain of one byte a token. Keys are balanced in the frame of
their page, where statistics do not drift with the position.
"""

from __future__ import annotations

from dataclasses import replace

from kvcompress.codecs import Band, Codec, Geometry, Quantiser, register
from kvcompress.codecs.balanced import Balanced
from kvcompress.codecs.lloyd import LloydMax
from kvcompress.codecs.scale import LOG
from kvcompress.codecs.trellis import Trellis
from kvcompress.spec import CodecSpec

FIT_TOKENS = 512
UNIT = 16  # dimensions that a band is made of

#: Bits of every quarter of the dimensions, strongest first, by their average: of the profiles nearest to reverse
#: water-filling, those of least KL on the embedded model (python -m benchmarks.profiles).
PROFILES: dict[float, tuple[int, int, int, int]] = {
    1.5: (3, 2, 1, 0),
    2: (4, 2, 1, 1),
    2.5: (4, 3, 2, 1),
    3: (4, 3, 3, 2),
    3.5: (5, 4, 3, 2),
    4: (5, 4, 4, 3),
}


def assemble(head_dim: int, bands: tuple[tuple[int, int], ...]) -> Codec:
    """The codec with bands of (width, bits), strongest first; zero bits drop a band."""
    kept = [(width, bits) for width, bits in bands if bits]
    return Codec(
        head_dim,
        Balanced(head_dim, tuple(width for width, _ in kept)),
        tuple(Band(width, _quantiser(bits)) for width, bits in kept),
        fit_tokens=FIT_TOKENS,
        weighted=True,
    )


def _quantiser(bits: int) -> Quantiser:
    return Trellis(bits, LOG) if bits <= 4 else LloydMax(bits, LOG)


def profile(head_dim: int, bits: float) -> tuple[tuple[int, int], ...]:
    """Bands of (width, bits), strongest first, whose average is as near to `bits` as whole bits allow.

    Units of 16 dimensions, and the 8 that may be left, take the bits of their part of the profile, rounded so that the
    sum up to each of them is as near as can be. Raises ValueError for a head_dim that is no multiple of 8.
    """
    if head_dim % 8:
        raise ValueError(f"head_dim must be a multiple of 8 for spectral codecs, got {head_dim}")
    each = [own for own in PROFILES[bits] for _ in range(head_dim)]  # by quarters of a dimension
    bands: list[tuple[int, int]] = []
    spent = 0
    for start in range(0, head_dim, UNIT):
        width = min(UNIT, head_dim - start)
        due = sum(each[: 4 * (start + width)]) / 4 - spent
        own = int(due / width + 0.5)
        spent += own * width
        if bands and bands[-1][1] == own:
            width += bands.pop()[0]
        bands.append((width, own))
    return tuple(bands)


@register("spectral", bits=tuple(PROFILES))
def build(spec: CodecSpec, geometry: Geometry) -> Codec:
    assert spec.bits is not None
    codec = assemble(geometry.head_dim, profile(geometry.head_dim, spec.bits))
    return codec if geometry.side else replace(codec, frame="page")
