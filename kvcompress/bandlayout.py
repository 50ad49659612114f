"""What kernels are told of a codec: its bands, and where their parts lie in a page's record."""

from __future__ import annotations

from functools import lru_cache

import torch

from kvcompress.codecs import SIDES, Band, Codec
from kvcompress.codecs.kivi import PerChannel, PerToken
from kvcompress.codecs.lloyd import GRIDS, LloydMax, codebook
from kvcompress.codecs.scale import HALF, Gain
from kvcompress.codecs.trellis import Trellis, shipped
from kvcompress.kernels.layout import BandLayout, GainKind, LevelTable, TrellisTable
from kvcompress.record import RecordLayout


def bands_of(codec: Codec, side: int, record: RecordLayout) -> tuple[BandLayout, ...] | str:
    """The bands of one side that are stored, or why kernels do not know them."""
    if type(codec) is not Codec:
        return f"{type(codec).__name__} codes heads together"
    offsets = {field.name: field.offset for field in record.fields}
    result, start = [], 0
    for index, band in enumerate(codec.bands):
        if band.quantiser is not None:
            found = _band(band, start, {name: offsets.get(f"{SIDES[side]}.{index}.{name}", 0) for name in PARTS})
            if isinstance(found, str):
                return found
            result.append(found)
        start += band.width
    return tuple(result)


PARTS = ("codes", "gain", "scale", "zero")


def _band(band: Band, start: int, at: dict[str, int]) -> BandLayout | str:
    quantiser = band.quantiser
    if isinstance(quantiser, (Trellis, LloydMax)):
        trellis = isinstance(quantiser, Trellis)
        table = _trellis(quantiser.bits) if trellis else _levels(quantiser.bits)
        return BandLayout(
            start, band.width, "trellis" if trellis else "lloyd", quantiser.bits, _gain(quantiser.gain), at["codes"],
            at["gain"], table=table,
        )  # fmt: skip
    if isinstance(quantiser, (PerToken, PerChannel)):
        kind = "affine_token" if isinstance(quantiser, PerToken) else "affine_channel"
        return BandLayout(
            start, band.width, kind, quantiser.bits, codes=at["codes"], scale=at["scale"], zero=at["zero"]
        )
    return f"codes of {type(quantiser).__name__}"


def _gain(gain: Gain) -> GainKind:
    return "half" if gain == HALF else "log"


@lru_cache
def _trellis(bits: int) -> TrellisTable:
    own = shipped(bits)
    return TrellisTable(tuple(tuple(row) for row in own["tables"]), own["offset"], own["step"])


@lru_cache
def _levels(bits: int) -> LevelTable:
    levels, borders = (tuple(x.tolist()) for x in codebook(bits, torch.device("cpu")))
    if bits not in GRIDS:
        return LevelTable(levels, borders)
    own = GRIDS[bits]
    return LevelTable(levels, borders, own.bytes, own.step, own.offset)
