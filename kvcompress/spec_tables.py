"""The tables of `kvcompress specs`: the codecs with what they take, and the presets."""

from __future__ import annotations

import sys

import torch
from rich.console import Console
from rich.table import Table

from kvcompress.codecs import Geometry
from kvcompress.presets import PRESETS
from kvcompress.spec import CODECS, CodecSpec


def print_codecs() -> None:
    """A table of every registered family: its bits, and what an element of a bfloat16 cache takes with its scales."""
    table = Table("spec", "bits per element\nhead_dim 64", "\n128", "what it is")
    for name in CODECS:
        what = (sys.modules[CODECS[name].build.__module__].__doc__ or "").partition("\n")[0]
        for position, example in enumerate(CODECS[name].examples):
            try:
                table.add_row(example, *_codec_bits(example), "" if position else what)
            except ValueError as error:  # what it needs is not installed
                table.add_row(example, "-", "-", str(error))
    Console().print(table)


def print_presets() -> None:
    table = Table("preset", "spec", "what it is")
    for name, preset in PRESETS.items():
        table.add_row(name, preset.source, preset.what)
    Console().print(table)


def _codec_bits(text: str) -> list[str]:
    """Bits per element of a bfloat16 cache with heads of 64 and of 128: of keys, and of values where they differ."""
    spec = CodecSpec.parse(text)
    cells = []
    for size in (64, 128):
        bits = [spec.build(Geometry(size, side, 2)).bits_per_element(torch.bfloat16) for side in (0, 1)]
        cells.append(f"{bits[0]:.3f}" if bits[0] == bits[1] else f"{bits[0]:.3f} / {bits[1]:.3f}")
    return cells
