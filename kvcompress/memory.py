"""Memory of a cache as measured: `MemoryReport`, whose bytes are those of real storage."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind `tensors`, views included, each storage counted once."""
    storages = {(x.device, x.untyped_storage().data_ptr()): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


@dataclass(frozen=True)
class MemoryReport:
    """Measured bytes of a cache, or of one layer; `+` adds layers.

    codes, scales: coded pages. means, bases: what was learned of each row. tables: which pages make up a row.
    exact: bytes held as they came (sinks, window, layers that are not compressed). tokens: of the longest row.
    coded_elements: numbers of keys and values held as codes. elements: all that are held. uncompressed: bytes that the
    same tokens take in the model's dtype. host, disk: those of the bytes of codes and scales that are offloaded to the
    host's memory or to a file (kvcompress/tiers.py).
    """

    codes: int
    scales: int
    means: int
    bases: int
    tables: int
    exact: int
    tokens: int
    coded_elements: int
    elements: int
    uncompressed: int
    host: int = 0
    disk: int = 0

    @classmethod
    def nothing(cls) -> MemoryReport:
        """The report of an empty cache; the start of a sum."""
        return cls(*[0] * len(dataclasses.fields(cls)))

    @property
    def coded(self) -> int:
        """Bytes of coded storage with all its overheads."""
        return self.codes + self.scales + self.means + self.bases + self.tables

    @property
    def total(self) -> int:
        """All bytes held, wherever they lie."""
        return self.coded + self.exact

    @property
    def device(self) -> int:
        """Bytes held on the device."""
        return self.total - self.host - self.disk

    @property
    def bits_per_element(self) -> float:
        """Bits of coded storage, overheads included, for each coded element; nan where nothing is coded."""
        return 8 * self.coded / self.coded_elements if self.coded_elements else math.nan

    @property
    def effective_bits_per_element(self) -> float:
        """Bits of everything held for each element, exact ones included; nan for an empty cache."""
        return 8 * self.total / self.elements if self.elements else math.nan

    @property
    def compression(self) -> float:
        """How many times smaller than in the model's dtype; nan for an empty cache."""
        return self.uncompressed / self.total if self.total else math.nan

    def __add__(self, other: MemoryReport) -> MemoryReport:
        if not isinstance(other, MemoryReport):
            return NotImplemented
        names = [field.name for field in dataclasses.fields(self)]
        added = {name: getattr(self, name) + getattr(other, name) for name in names}
        return MemoryReport(**added | {"tokens": max(self.tokens, other.tokens)})

    def __str__(self) -> str:
        if not self.elements:
            return "cache: empty"
        parts = ", ".join(
            f"{name} {format_bytes(getattr(self, name))}"
            for name in ("codes", "scales", "means", "bases", "tables", "exact")
            if getattr(self, name)
        )
        if self.host or self.disk:
            places = {"on the device": self.device, "in the host's memory": self.host, "on disk": self.disk}
            parts += "\n  " + ", ".join(f"{format_bytes(size)} {place}" for place, size in places.items() if size)
        share = self.coded_elements / self.elements
        bits = f"{self.effective_bits_per_element:.2f} bits per element, exact ones included"
        if self.coded_elements:
            bits = f"{self.bits_per_element:.2f} bits per coded element ({share:.1%} of all); {bits}"
        return (
            f"cache of {self.tokens:,} tokens: {format_bytes(self.total)}, uncompressed "
            f"{format_bytes(self.uncompressed)} ({self.compression:.2f}x)\n  {parts}\n  {bits}"
        )


def format_bytes(count: float) -> str:
    """Bytes in the binary unit (B, KiB, MiB, GiB, TiB) that suits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:,.2f} TiB"
