"""What every encode kernel is launched with: one side's pages, what was learned of them, the records to fill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .layout import ALIGNMENT, PAGE, BandLayout
from .variant import ARCHS, Variant

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Inputs:
    """x: [n, H, PAGE, D], fp32, fp16 or bf16. mean: float32 [n or 1, H, D], None: zero. analysis: float32
    [n or 1, H, R, D] or [R, D], None: the identity. records: uint8 [n, page_bytes], rows anywhere that is aligned.

    Raises ValueError where they do not belong together.
    """

    x: Tensor
    mean: Tensor | None
    analysis: Tensor | None
    records: Tensor

    def __post_init__(self) -> None:
        if self.x.ndim != 4 or self.x.shape[2] != PAGE or self.x.dtype not in DTYPES or self.x.stride(3) != 1:
            raise ValueError(
                f"x must be [n, H, {PAGE}, D] with D contiguous, of {', '.join(map(str, DTYPES))}; "
                f"got {tuple(self.x.shape)} with strides {self.x.stride()}, {self.x.dtype}"
            )
        n, H, _, D = self.x.shape
        self._check("mean", self.mean, [(n, H, D), (1, H, D)])
        rank = self.rank
        self._check("analysis", self.analysis, [(n, H, rank, D), (1, H, rank, D), (rank, D)])
        aligned = self.records.data_ptr() % ALIGNMENT == 0
        strides = self.records.stride()
        if (
            self.records.dtype != torch.uint8
            or self.records.shape != (n, self.page_bytes)
            or (not aligned or strides[0] % ALIGNMENT or strides[1] != 1 or self.page_bytes % ALIGNMENT)
        ):
            raise ValueError(
                f"records must be uint8 [{n}, page_bytes], rows contiguous and {ALIGNMENT}-byte aligned; "
                f"got {tuple(self.records.shape)} with strides {strides}, {self.records.dtype}"
            )
        if self.records.device != self.x.device:
            raise ValueError(f"records must lie on {self.x.device} as x does, got {self.records.device}")

    def _check(self, name: str, tensor: Tensor | None, shapes: list[tuple[int, ...]]) -> None:
        if tensor is None:
            return
        if tuple(tensor.shape) not in shapes or tensor.dtype != torch.float32 or tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} must be float32 of shape {' or '.join(map(str, shapes))}, its last dimension contiguous; "
                f"got {tuple(tensor.shape)} with strides {tensor.stride()}, {tensor.dtype}"
            )
        if tensor.device != self.x.device:
            raise ValueError(f"{name} must lie on {self.x.device} as x does, got {tensor.device}")

    @property
    def rank(self) -> int:
        """R, the dimensions that bands are made of."""
        return self.x.shape[3] if self.analysis is None else self.analysis.shape[-2]

    @property
    def page_bytes(self) -> int:
        return self.records.shape[-1]

    def check_band(self, band: BandLayout, parts: dict[str, tuple[int, int]]) -> None:
        """ValueError unless the band's dimensions exist and its parts, (offset, bytes) by name, lie in the record."""
        if band.start + band.width > self.rank:
            raise ValueError(f"the band ends at dimension {band.start + band.width}, there are {self.rank}")
        for name, (offset, size) in parts.items():
            if offset + size > self.page_bytes:
                raise ValueError(f"{name} ends at byte {offset + size} of a record of {self.page_bytes}")

    def arguments(self, band: BandLayout) -> dict[str, Any]:
        """Pointers, strides and places in the record, by the names that all encode kernels give them."""
        shape = self.x.shape
        mean = None if self.mean is None else self.mean.expand(shape[0], shape[1], shape[3])
        analysis = None if self.analysis is None else self.analysis.expand(shape[0], shape[1], self.rank, shape[3])
        return {
            "x": self.x,
            "mean": self.x if mean is None else mean,
            "analysis": self.x if analysis is None else analysis,
            "words": self.records.view(torch.int32),
            "halves": self.records.view(torch.float16),
            "octets": self.records,
            "x_page": self.x.stride(0),
            "x_head": self.x.stride(1),
            "x_token": self.x.stride(2),
            "mean_page": 0 if mean is None else mean.stride(0),
            "mean_head": 0 if mean is None else mean.stride(1),
            "analysis_page": 0 if analysis is None else analysis.stride(0),
            "analysis_head": 0 if analysis is None else analysis.stride(1),
            "analysis_row": 0 if analysis is None else analysis.stride(2),
            "record": self.records.stride(0),
            "codes_at": band.codes // 4,
            "scale_at": band.scale // (1 if band.gain == "log" else 2),
            "start": band.start,
        }

    def constants(self, band: BandLayout) -> dict[str, Any]:
        """Constants that all encode kernels have."""
        return constants(band, self.x.shape[1], self.x.shape[3], self.mean is not None, self.analysis is not None)


def constants(band: BandLayout, heads: int, head_dim: int, centred: bool, dense: bool) -> dict[str, Any]:
    return {
        "H": heads,
        "D": head_dim,
        "WIDTH": band.width,
        "BITS": band.bits,
        "CENTRED": centred,
        "DENSE": dense,
        "LOG": band.gain == "log",
    }


def variant(
    function: Any,
    codec: str,
    constants: Mapping[str, Any],
    head_dim: int,
    *,
    warps: int,
    elements: int,
    hip: bool | None,
) -> Variant:
    """An encode kernel as compiled without a GPU, of bf16 vectors. hip: only for AMD, or not for it; None: for all."""
    types = dict.fromkeys(("mean", "analysis", "values", "levels", "borders"), "*fp32")
    types |= {"x": "*bf16", "words": "*i32", "halves": "*fp16", "octets": "*u8", "workspace": "*i32", "unit": "fp32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in function.arg_names}
    strides = ("x_page", "x_head", "x_token", "mean_page", "mean_head", "analysis_page", "analysis_head")
    return Variant(
        kernel="encode",
        codec=codec,
        head_dim=head_dim,
        function=function,
        signature=signature,
        constants=constants,
        aligned=tuple(
            n for n, t in signature.items() if t.startswith("*") or n in (*strides, "analysis_row", "record")
        ),
        num_warps=warps,
        num_stages=1,
        elements=elements,
        archs=tuple(arch for arch in ARCHS if hip is None or arch.startswith("gfx") == hip),
    )
