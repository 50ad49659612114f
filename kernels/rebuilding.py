"""What kernels need to make keys again that were coded without their rotary embedding; the angles of pages.

A key is R(position) (W y + mean): W the codec's synthesis, R a rotation of planes (kvcompress/planes.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check
from .layout import PAGE
from .pages import Table
from .variant import Variant

#: What a frame is called by the kernel, and how far from a page's first token its angle is taken.
FRAMES = {"page": (1, PAGE // 2), "token": (2, 0)}


@triton.jit
def angles_kernel(
    Starts, Counts, starts_row, Frequencies, Amplitudes, Angles, angles_row, middle, HALF: tl.constexpr,
    HP: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """[B, pages, 2, HALF]: cosines and sines of where pages stand, times the planes' amplitudes; P pages a program.

    By a kernel of its own, since a sine costs a lane some 40 instructions, and in the layout of a matrix product every
    lane would need those of a quarter of the planes.
    """
    row = tl.program_id(1)
    page = tl.program_id(0) * P + tl.arange(0, P)
    plane = tl.arange(0, HP)
    held = page < tl.load(Counts + row)
    position = tl.load(Starts + row.to(tl.int64) * starts_row + page, held, 0) + middle
    frequency = tl.load(Frequencies + plane, plane < HALF, 0.0)
    amplitude = tl.load(Amplitudes + plane, plane < HALF, 0.0)[None, :]
    angle = position.to(tl.float32)[:, None] * frequency[None, :]
    place = Angles + row.to(tl.int64) * angles_row + page[:, None] * (2 * HALF) + plane[None, :]
    known = held[:, None] & (plane < HALF)[None, :]
    tl.store(place, tl.cos(angle) * amplitude, known)
    tl.store(place + HALF, tl.sin(angle) * amplitude, known)


@triton.jit
def angles_of(angles, CHUNK: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr):
    """(cosines, sines) [C] of a page's position, times the planes' amplitudes."""
    plane = CHUNK * C + tl.arange(0, C)
    return tl.load(angles + plane, plane < HALF, 0.0), tl.load(angles + HALF + plane, plane < HALF, 0.0)


@triton.jit
def steps_of(Table, token, CHUNK: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr):
    """float32 [64, C] of a table [64, HALF]."""
    plane = CHUNK * C + tl.arange(0, C)
    return tl.load(Table + token[:, None] * HALF + plane[None, :], (plane < HALF)[None, :], 0.0)


@dataclass(frozen=True, eq=False)
class Rebuilding:
    """How keys are made of what their codes stand for, and turned.

    first, second: float16 [B or 1, H, R, D / 2], the keys' synthesis by its rows of planes' first and second
    coordinates, R in the order of the plan's `keys`. mean: float32 [B or 1, H, D], None where keys are not centred.
    order: int32 [D], the planes' first coordinates, then their second ones. frequencies, amplitudes: float32 [D / 2].
    frame: "page" or "token".
    """

    first: Tensor
    second: Tensor
    mean: Tensor | None
    order: Tensor
    frequencies: Tensor
    amplitudes: Tensor
    frame: str

    def check(self, rows: int, heads: int, width: int, rank: int) -> None:
        """Raises ValueError unless this is for a batch of `rows` and keys of `heads` heads of `width` dimensions."""
        device, half = self.first.device, width // 2
        if self.frame not in FRAMES:
            raise ValueError(f"frame must be one of {', '.join(FRAMES)}, got {self.frame!r}")
        if width % 2 or not 16 <= width <= 256:
            raise ValueError(f"head_dim must be even and in 16..256, got {width}")
        owners = len(self.first)
        if owners not in (1, rows):
            raise ValueError(f"first must be of 1 or {rows} rows, got {owners}")
        for name in ("first", "second"):
            check(name, getattr(self, name), (owners, heads, rank, half), (torch.float16,), device)
        check("order", self.order, (width,), (torch.int32,), device)
        for name in ("frequencies", "amplitudes"):
            check(name, getattr(self, name), (half,), (torch.float32,), device)
        if self.mean is not None:
            own = len(self.mean)  # rows learn means of their own also where one transform is for all
            check("mean", self.mean, (own if own in (1, rows) else owners, heads, width), (torch.float32,), device)
        for name in ("first", "second", "mean", "order", "frequencies", "amplitudes"):
            if getattr(self, name) is not None and not getattr(self, name).is_contiguous():
                raise ValueError(f"{name} must be contiguous, got strides {getattr(self, name).stride()}")

    def steps(self) -> tuple[Tensor, Tensor]:
        """(cosines, sines) float32 [PAGE, D / 2] of the angles of 0 to PAGE - 1 steps."""
        angles = torch.arange(PAGE, device=self.order.device).unsqueeze(1) * self.frequencies.double()
        return angles.cos().float(), angles.sin().float()


def page_angles(rebuilding: Rebuilding, table: Table) -> Tensor:
    """float32 [B, most, 2, D / 2]: cosines and sines of where pages stand, times the planes' amplitudes."""
    rows, half = len(table.counts), len(rebuilding.frequencies)
    angles = torch.empty(rows, table.most, 2, half, dtype=torch.float32, device=table.starts.device)
    pages = 16
    angles_kernel[(triton.cdiv(table.most, pages), rows)](
        table.starts, table.counts, table.starts.stride(0), rebuilding.frequencies, rebuilding.amplitudes,
        angles, angles.stride(0), FRAMES[rebuilding.frame][1],
        HALF=half, HP=triton.next_power_of_2(half), P=pages,
    )  # fmt: skip
    return angles


def variants() -> list[Variant]:
    """The angles of pages at head_dim 128."""
    pointers = dict.fromkeys(("Starts", "Counts"), "*i32")
    pointers |= dict.fromkeys(("Frequencies", "Amplitudes", "Angles"), "*fp32")
    constants = {"HALF": 64, "HP": 64, "P": 16}
    types = {**dict.fromkeys(constants, "constexpr"), **pointers}
    signature = {name: types.get(name, "i32") for name in angles_kernel.arg_names}
    aligned = (*pointers, "starts_row", "angles_row")
    return [Variant("angles", "-", 128, angles_kernel, signature, constants, aligned, 4, 1)]
