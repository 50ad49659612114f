"""Code one side of pages, keys or values, into their records: the entry to the encode kernels.

One launch a band; nothing of the size of the cache lies between the vectors and their codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .encode_inputs import Inputs
from .encode_scalar import launch_affine, launch_lloyd
from .encode_trellis import launch as launch_trellis
from .layout import GROUP, PAGE, BandLayout

LAUNCH = {
    "trellis": launch_trellis,
    "lloyd": launch_lloyd,
    "affine_token": launch_affine,
    "affine_channel": launch_affine,
}


def encode_side(
    x: Tensor, mean: Tensor | None, analysis: Tensor | None, records: Tensor, bands: tuple[BandLayout, ...]
) -> None:
    """Write the codes and scales of all bands of y = analysis (x - mean) into the records, and nothing else of them.

    x: [n, H, PAGE, D], fp32, fp16 or bf16, D contiguous. mean: float32 [n or 1, H, D]; None: zero. analysis: float32
    [n or 1, H, R, D] or [R, D]; None: the identity. records: uint8 [n, page_bytes], a slab or a strided view of one.
    Workspace: `encode_trellis.WORKSPACE` bytes at most. Raises ValueError where these do not belong together.
    """
    inputs = Inputs(x, mean, analysis, records)
    for band in bands:
        inputs.check_band(band, parts(band, x.shape[1]))
    if not len(x):
        return
    with torch.cuda.device_of(x):
        for band in bands:
            LAUNCH[band.kind](inputs, band)


def parts(band: BandLayout, heads: int) -> dict[str, tuple[int, int]]:
    """(offset, bytes) of a band's parts in the record, by name."""
    codes = (band.codes, heads * band.width * PAGE * band.bits // 8)
    if band.kind in ("trellis", "lloyd"):
        return {"codes": codes, "scale": (band.scale, heads * PAGE * (1 if band.gain == "log" else 2))}
    grids = band.width * PAGE // GROUP if band.kind == "affine_channel" else band.groups * PAGE
    return {"codes": codes, "scale": (band.scale, heads * grids * 2), "zero": (band.zero, heads * grids * 2)}
