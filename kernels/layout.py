"""How the codes of one side lie in a page's record: what the encode kernels write and the decode kernels read.

A record is `page_bytes` bytes, PAGE tokens of one layer. A band's parts lie in it at 16-byte aligned offsets, each
contiguous over the heads::

    codes   [H, width PAGE bits / 8]   blocks of 4 dimensions x 8 tokens, in the order of kvcompress/packing.py
    scale   [H, PAGE]                  the gain: float16 ("half"), or one byte ("log"); trellis and lloyd
            [H, PAGE, groups]          float16; affine_token, a group is GROUP dimensions, the last one may be fewer
            [H, PAGE / GROUP, width]   float16; affine_channel, a group is GROUP tokens
    zero    as scale                   float16; affine only

Plain numbers throughout, so that a layout can be a key of a cache of kernels or of tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PAGE = 64  # tokens
GROUP = 32  # tokens or dimensions that share an affine scale
ALIGNMENT = 16  # bytes, of records and their parts
LARGEST = 256  # dimensions of a band
KINDS = ("trellis", "lloyd", "affine_token", "affine_channel")

Kind = Literal["trellis", "lloyd", "affine_token", "affine_channel"]
GainKind = Literal["half", "log"]


def fields(window: int, bits: int) -> tuple[int, int, int]:
    """What a window of nine bits, the newest lowest, looks up in A, B and C (kvcompress/codecs/trellis.py)."""
    if bits == 4:
        return window >> 1 & 7, window >> 5 & 7, window & 1 | window >> 3 & 2 | window >> 6 & 4
    return window & 7, window >> 3 & 7, window >> 6


@dataclass(frozen=True)
class TrellisTable:
    """The numbers that nine-bit windows stand for: step (A[f0] + B[f1] + C[f2] - offset), f the window's `fields`.

    tables: A, B and C, eight bytes each.
    """

    tables: tuple[tuple[int, ...], ...]
    offset: float
    step: float

    def __post_init__(self) -> None:
        if [len(table) for table in self.tables] != [8, 8, 8]:
            raise ValueError(f"a trellis has three tables of eight, got {self.tables}")


@dataclass(frozen=True)
class LevelTable:
    """The 2^bits numbers that codes stand for, and the 2^bits - 1 borders between them, both ascending.

    grid: where they lie on one, bytes below 128 with levels = step (byte - offset); what attention kernels look up.
    """

    levels: tuple[float, ...]
    borders: tuple[float, ...]
    grid: tuple[int, ...] = ()
    step: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        if len(self.borders) != len(self.levels) - 1:
            raise ValueError(f"{len(self.levels)} levels need one border fewer, got {len(self.borders)}")


@dataclass(frozen=True)
class BandLayout:
    """Transformed dimensions start .. start + width - 1 under one quantiser, and where their parts lie.

    codes, scale, zero: offsets in the record in bytes; zero is used by the affine kinds only, gain not by them.
    table: what the codes stand for; a TrellisTable or LevelTable as the kind has it, None for the affine kinds.

    Raises ValueError for what no kernel can write or read.
    """

    start: int
    width: int
    kind: Kind
    bits: int
    gain: GainKind = "half"
    codes: int = 0
    scale: int = 0
    zero: int = 0
    table: TrellisTable | LevelTable | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.gain not in ("half", "log"):
            raise ValueError(f"gain must be 'half' or 'log', got {self.gain!r}")
        largest = 4 if self.kind == "trellis" else 8
        if not 1 <= self.bits <= largest:
            raise ValueError(f"bits must lie in 1..{largest} for {self.kind}, got {self.bits}")
        if self.width % 8 or not 8 <= self.width <= LARGEST or self.start < 0:
            raise ValueError(
                f"a band's width must be a multiple of 8 in 8..{LARGEST} and its start 0 or more, "
                f"got {self.width} from {self.start}"
            )
        if misplaced := [offset for offset in (self.codes, self.scale, self.zero) if offset < 0 or offset % ALIGNMENT]:
            raise ValueError(f"offsets must be multiples of {ALIGNMENT}, got {misplaced}")
        self._check_table()

    def _check_table(self) -> None:
        wanted = {"trellis": TrellisTable, "lloyd": LevelTable}.get(self.kind, type(None))
        if not isinstance(self.table, wanted):
            raise ValueError(f"{self.kind} needs a table of type {wanted.__name__}, got {self.table!r}")
        if isinstance(self.table, LevelTable) and len(self.table.levels) != 2**self.bits:
            raise ValueError(f"{self.bits} bits need {2**self.bits} levels, got {len(self.table.levels)}")

    @property
    def groups(self) -> int:
        """Groups of GROUP dimensions."""
        return -(-self.width // GROUP)
