"""Measured bytes of any cache: the storage behind every tensor that its layers hold, each counted once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Cache

from kvcompress import CompressedCache

#: Where QuantizedCache's layers keep what they quantised.
QUANTISED = ("_quantized_keys", "_quantized_values")


@dataclass(frozen=True)
class Footprint:
    """What a cache takes beside an uncompressed one of the same tokens, both in bytes.

    bits_per_element: of the coded part with its scales and other overheads, None where nothing is coded.
    effective_bits_per_element: of everything held, exact tokens included, over all elements.
    """

    total: int
    uncompressed: int
    bits_per_element: float | None
    effective_bits_per_element: float

    @property
    def compression(self) -> float:
        return self.uncompressed / self.total

    def fields(self) -> dict[str, Any]:
        """By the names that rows of results have for them."""
        return {
            "bits_per_element": self.bits_per_element,
            "effective_bits_per_element": self.effective_bits_per_element,
            "bytes": self.total,
            "uncompressed_bytes": self.uncompressed,
        }


def tensors(held: Any) -> Iterator[Tensor]:
    """The plain tensors within tensors, tuples, lists and dicts; wrapper subclasses are opened."""
    if isinstance(held, Tensor):
        if hasattr(held, "__tensor_flatten__"):
            yield from tensors([getattr(held, name) for name in held.__tensor_flatten__()[0]])
        else:
            yield held
    elif isinstance(held, dict):
        yield from tensors(list(held.values()))
    elif isinstance(held, (list, tuple)):
        for item in held:
            yield from tensors(item)


def nbytes(held: Any) -> int:
    """Bytes of the storages behind everything in `held`; views of one storage count once, as the whole of it."""
    storages = [tensor.untyped_storage() for tensor in tensors(held)]
    return sum(
        {(storage.device, storage.data_ptr()): storage.nbytes() for storage in storages if storage.nbytes()}.values()
    )


def count(held: Any) -> int:
    """Elements of all tensors in `held`."""
    return sum(tensor.numel() for tensor in tensors(held))


def cache_bytes(cache: Cache) -> int:
    """Bytes of everything that a cache holds."""
    if isinstance(cache, CompressedCache):
        return cache.memory().total
    return nbytes([vars(layer) for layer in cache.layers])


def footprint(cache: Cache, reference: Cache) -> Footprint:
    """What `cache` takes, with an uncompressed `reference` that holds the same tokens to count the elements by."""
    if isinstance(cache, CompressedCache):
        report = cache.memory()
        bits = report.bits_per_element if report.coded_elements else None
        return Footprint(report.total, report.uncompressed, bits, report.effective_bits_per_element)
    held, uncompressed = [vars(layer) for layer in cache.layers], [vars(layer) for layer in reference.layers]
    coded = [layer[name] for layer in held for name in QUANTISED if name in layer]
    exact = [layer[name] for layer in held for name in ("keys", "values") if name in layer]
    elements = count(uncompressed)
    coded_elements = elements - count(exact) if coded else 0
    bits = 8 * nbytes(coded) / coded_elements if coded_elements else None
    return Footprint(cache_bytes(cache), nbytes(uncompressed), bits, 8 * cache_bytes(cache) / elements)
