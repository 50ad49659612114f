"""What a session of continuous batching holds, counted over the bytes of its blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers.generation.continuous_batching.cache_allocators import CacheAllocator
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

from kvcompress.batching.allocator import RecordsAllocator
from kvcompress.memory import MemoryReport, storage_bytes
from kvcompress.store import PAGE


def held(manager: ContinuousBatchingManager, together: bool = False) -> MemoryReport:
    """Of the blocks that requests own at this moment, each counted once however many share it, whole as they are.

    Blocks that no request owns, kept for prompts that begin alike, are free to be taken and not among them; nor is the
    room of the pool that nobody has taken (`pool_bytes`). exact: of sliding layers. together: count the tokens of all
    requests, and not of the longest one.
    """
    processor = manager.batch_processor
    report = MemoryReport.nothing()
    if processor is None:
        return report
    lengths = {name: state.current_len() for name, state in list(processor.scheduler.active_requests.items())}
    for allocator in processor.cache.cache_allocators.values():
        report += _of(allocator, lengths, processor.cache)
    return replace(report, tokens=sum(lengths.values())) if together else report


def pool_bytes(manager: ContinuousBatchingManager) -> int:
    """Bytes of the whole cache tensor, allocated at the start; zero before it is there."""
    processor = manager.batch_processor
    return 0 if processor is None else processor.cache.cache_tensor.untyped_storage().nbytes()


def _of(allocator: CacheAllocator, lengths: dict[str, int], cache: Any) -> MemoryReport:
    """What requests of these lengths, in tokens, hold in the layers of one kind."""
    size = allocator.tokens_per_page
    most = getattr(allocator, "sliding_window", max(lengths.values(), default=0))
    filled: dict[int, int] = {}  # tokens of each block
    for name, blocks in list(allocator.block_table.items()):
        length = min(lengths.get(name, 0), most)
        for place, block in enumerate(list(blocks)):
            filled[block] = max(filled.get(block, 0), min(max(length - place * size, 0), size))
    layers = allocator.pages_per_block
    vectors = sum(filled.values()) * layers * 2 * find_num_key_value_heads(cache.config)
    elements = vectors * find_head_dim(cache.config)
    stored = len(filled) * allocator._copy_view[0].nbytes
    coded = isinstance(allocator, RecordsAllocator)
    codes, means, bases = _parts(allocator, len(filled)) if isinstance(allocator, RecordsAllocator) else (0, 0, 0)
    return MemoryReport(
        codes=codes,
        scales=stored - codes if coded else 0,
        means=means,
        bases=bases,
        tables=0,
        exact=0 if coded else stored,
        tokens=max(lengths.values(), default=0),
        coded_elements=elements if coded else 0,
        elements=elements,
        uncompressed=elements * cache.dtype.itemsize,
    )


def _parts(allocator: RecordsAllocator, blocks: int) -> tuple[int, int, int]:
    """Bytes of codes in so many blocks, and of means and bases, which all requests share."""
    codes = means = bases = 0
    for attention in allocator.attention.values():
        shares = attention.layout.record.shares()
        codes += sum(size for name, size in shares.items() if name.endswith(".codes"))
        for codec in attention.layout.codecs:
            means += sum(x.nbytes for name, x in codec.fit.items() if name == "mean")
            bases += sum(x.nbytes for name, x in codec.fit.items() if name != "mean")
        bases += 0 if attention.derived is None else storage_bytes(attention.derived.tensors)
    return codes * blocks * (allocator.tokens_per_page // PAGE), means, bases
