"""How a cache looks in every picture: a colour for its family, filled marks and full lines for ours.

Ours have cool colours, the peers' methods warm ones; the uncompressed cache has the colour of the text. The colours are
of a middle lightness, which can be told from a white page and from a black one.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from functools import cache
from typing import Any

from benchmarks.caches import OUR_SIDE, PEER_SIDE, REFERENCE, UNCOMPRESSED, compressed, quantized_caches
from benchmarks.report.svg import INK, PAPER

COLOURS = {
    "pre-RoPE spectral": "#2f6fdf",
    "spectral": "#169fb5",
    "trellis": "#2a9d58",
    "trellis k>v": "#6c9a1f",
    "trellis auto": "#7d9c2c",
    "pre-RoPE trellis": "#3fa079",
    "lloyd": "#7a5bd6",
    "exact": "#7d8797",
    "low rank": "#a34fc4",
    "pre-RoPE low rank": "#c25bb4",
    "low rank + trellis": "#8b6fb8",
    "pre-RoPE low rank + trellis": "#6a86c9",
    "joint low rank + trellis": "#9a7fd1",
    "residual + trellis": "#5a94a8",
    "TurboQuant": "#e0662b",
    "KIVI": "#b8860b",
    "KVQuant": "#d23f4f",
    "KVarN": "#a8643c",
    "KVarN k>v": "#c07f55",
    "NF4": "#d9728a",
    "bnb 8 bits": "#a87878",
    "fp8": "#948a7c",
    "QuantizedCache quanto": "#8f7a2a",
    "QuantizedCache hqq": "#b0483a",
}
#: For families that are not in the lists.
SPARE = ("#5b7fa6", "#5fa08c", "#8a7fb5", "#a07f8f", "#7f8f5f")

#: Marks of ours and of the peers by bits, for the members of a family in one picture.
MARKS = {"1": "vv", "1.5": "Pp", "2": "^^", "2.5": "<<", "3": "os", "3.5": ">>", "4": "DD"}


@cache
def place(name: str) -> tuple[str, str]:
    """(side, family) of a cache by its name; a name that is no spec here stands for itself, on the peers' side."""
    stock = {each.name: each for each in (UNCOMPRESSED, *quantized_caches())}
    try:
        found = stock[name] if name in stock else compressed(name)
    except ValueError:
        return PEER_SIDE, name
    return found.side, found.family


def colour(family: str) -> str:
    """The family's colour, whatever settings stand behind its name."""
    bare = family.split(",")[0]
    return COLOURS.get(bare) or SPARE[zlib.crc32(bare.encode()) % len(SPARE)]


def family_style(side: str, family: str) -> dict[str, Any]:
    """The line and marker of a family."""
    return _style(side, family)


def cache_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The line and marker of each cache, members of a family told apart by their markers, which say their bits."""
    return {name: _style(*place(name), _bits(name)) for name in dict.fromkeys(names)}


def _bits(name: str) -> str:
    """The last number in a cache's name that MARKS knows, else that of a circle or a square."""
    return next((found for found in reversed(re.findall(r"[\d.]+", name.split(",")[0])) if found in MARKS), "3")


def _style(side: str, family: str, bits: str = "3") -> dict[str, Any]:
    if side == REFERENCE:
        return {"color": INK, "ls": "-", "lw": 2.0, "marker": "", "ms": 0}
    if side == OUR_SIDE:
        return {"color": colour(family), "ls": "-", "lw": 1.5, "marker": MARKS[bits][0], "ms": 4.5}
    line = {"color": colour(family), "ls": (0, (4, 2)), "lw": 1.1, "marker": MARKS[bits][1], "ms": 4.5}
    return {**line, "markerfacecolor": PAPER}
