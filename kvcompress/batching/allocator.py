"""transformers' paged cache of full-attention layers, its blocks holding records of tokens in place of their numbers.

A page of `page_size` tokens is `page_size / PAGE` records of pages of codes (kvcompress/paged/blocks.py). A block holds
them for every layer, the layers side by side, so that a layer's records lie at one stride whatever the page size:

    block   record 0: layer 0 | layer 1 | ...   record 1: layer 0 | layer 1 | ...
    slot    block * page_size + token within the block: what transformers' read and write indices count here

Records depend on no other token, so blocks are shared, forked and copied as transformers does it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.generation.continuous_batching.cache import ATTN_TYPE_TO_ALLOCATOR, group_layers_by_attn_type
from transformers.generation.continuous_batching.cache_allocators import (
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    CachePool,
    FullAttentionCacheAllocator,
)
from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

from kvcompress import backends
from kvcompress.paged.attention import BlockAttention
from kvcompress.paged.blocks import BlockLayout
from kvcompress.paged.codecs import codecs
from kvcompress.paged.rows import Step
from kvcompress.record import ALIGNMENT
from kvcompress.spec import CacheSpec
from kvcompress.store import PAGE

WASTE = 0.05  # of a record: what may be left empty so that blocks of unlike layers fill a sector together
SHARES = 64  # sliding blocks in a sector at most
TRASH = 2  # sectors that transformers adds to a pool for tokens that fill up a batch


class RecordsAllocator(FullAttentionCacheAllocator):
    """Of full-attention layers under `spec`; everything but what a block holds is transformers' own.

    attention: by layer, what attends its blocks. blocks: by layer, its records uint8 [n, bytes], views of the cache.
    page_size must be a multiple of PAGE. Raises ValueError for a spec whose codecs these layers cannot have.
    """

    supports_block_table = False

    def __init__(
        self,
        index: int,
        config: PreTrainedConfig,
        num_key_value_heads: int,
        cache_dtype: torch.dtype,
        page_size: int,
        layer_indices: list[int],
        allow_block_sharing: bool,
        *,
        spec: CacheSpec,
    ):
        self.head_dim, self.num_key_value_heads = find_head_dim(config), num_key_value_heads
        self.cache_dtype = cache_dtype
        self.layouts = layouts(spec, self.head_dim, num_key_value_heads, cache_dtype, layer_indices)
        self.record_bytes = record_bytes(self.layouts[layer_indices[0]], config, num_key_value_heads, cache_dtype)
        self._before_cache_tensor_init(
            index=index,
            layer_indices=layer_indices,
            tokens_per_page=page_size,
            bytes_per_page=page_size // PAGE * self.record_bytes,
            allow_block_sharing=allow_block_sharing,
        )
        self.block_physical_stride = page_size
        self.attention: dict[int, BlockAttention] = {}
        self.blocks: dict[int, Tensor] = {}
        self._steps: tuple[Any, Step] | None = None
        self.attended: set[int] = set()  # layers that have, in this step

    def register_cache_tensor(
        self, bytes_per_sector: int, non_trash_bytes: int, cache_tensor: Tensor, pool: CachePool
    ) -> None:
        self.bytes_per_sector = bytes_per_sector
        self._copy_view = cache_tensor.view(-1, self.bytes_per_block)
        self._after_cache_tensor_init(non_trash_bytes, bytes_per_sector, cache_tensor, pool)
        records = cache_tensor.view(-1, self.pages_per_block, self.record_bytes)
        for place, layer in enumerate(self.layer_indices):
            key, value = (codec.to(cache_tensor.device) for codec in self.layouts[layer].codecs)
            self.attention[layer] = BlockAttention(BlockLayout(key, value))
            self.blocks[layer] = records[:, place]

    def write(self, layer: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Code a layer's keys and values [T, H, D] into slots int64 [T]. Raises ValueError for other heads."""
        wanted = (self.num_key_value_heads, self.head_dim)
        for x in (key, value):
            if x.shape[1:] != wanted:
                raise ValueError(f"layer {layer} has heads {tuple(x.shape[1:])}, its config says {wanted}")
        self.attention[layer].layout.write(self.blocks[layer], key, value, slots)

    def step(self, given: dict[str, Any]) -> Step:
        """The requests of a step, of what transformers gives attention functions; made once for all layers."""
        made_of = given["read_index"]
        if self._steps is None or self._steps[0] is not made_of:  # a list of its own for every forward pass
            self._steps, self.attended = (made_of, self._step(given)), set()
        return self._steps[1]

    def enter(self, layer: int, given: dict[str, Any]) -> Step:
        """The step, for a layer's attention. Raises RuntimeError where that has been in it before: a layer whose
        attention is several functions' (DiffLlama) would have the last one's keys and values only."""
        step = self.step(given)
        if layer in self.attended:
            raise RuntimeError(f"layer {layer} attends more than once in a step, to keys or values that are not cached")
        self.attended.add(layer)
        return step

    def _step(self, given: dict[str, Any]) -> Step:
        queries, columns = given["cu_seq_lens_q"].tolist(), given["cu_seq_lens_k"][self.layer_type].tolist()
        lengths = [stop - start for start, stop in pairwise(columns)]
        read = given["read_index"][self.index]
        pages = -(-max(lengths) // PAGE) if len(read) else 0  # nothing is read where all requests begin
        first = torch.tensor(columns[:-1], device=read.device).unsqueeze(1)
        tokens = first + torch.arange(pages, device=read.device) * PAGE
        ids = read[tokens.clamp_max(max(len(read) - 1, 0))] // PAGE
        alike = backends.choose(read.device)[0].name == "torch"
        return Step(ids.int(), tuple(queries), tuple(lengths), alike)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, read_index: Tensor, write_index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Raises RuntimeError: other attention than ours would have a layer's whole history decoded."""
        raise RuntimeError(
            f"layer {layer_idx} holds codes, and the model's attention was switched to one that reads numbers: "
            "leave it to the manager while one is running"
        )

    def get_cache_for_block_table(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("kernels that read a cache of numbers cannot read codes")


def layouts(
    spec: CacheSpec, head_dim: int, heads: int, dtype: torch.dtype, layers: list[int]
) -> dict[int, BlockLayout]:
    """How blocks hold each layer's records; one for all where nothing was learned of layers by themselves."""
    if spec.basis == "prompt":
        return dict.fromkeys(layers, BlockLayout(*codecs(spec, head_dim, heads, dtype)))
    return {layer: BlockLayout(*codecs(spec, head_dim, heads, dtype, layer)) for layer in layers}


def record_bytes(layout: BlockLayout, config: PreTrainedConfig, heads: int, dtype: torch.dtype) -> int:
    """Bytes that a record is given: what it takes, and where some layers slide, what makes blocks share sectors.

    transformers' sectors are the least common multiple of the blocks of both kinds of layers, which for unrelated sizes
    is most of a GPU.
    """
    record, groups = layout.record.page_bytes, group_layers_by_attn_type(config)
    if SLIDING_ATTENTION not in groups:
        return record
    numbers = FullAttentionCacheAllocator.get_bytes_per_page(heads, find_head_dim(config), dtype, PAGE)
    sliding, layers = numbers * len(groups[SLIDING_ATTENTION]), len(groups[FULL_ATTENTION])
    found = []
    for count in range(1, SHARES + 1):
        for blocks in range(count * sliding // (layers * record), 0, -1):
            size, rest = divmod(count * sliding, blocks * layers)
            if not rest and size % ALIGNMENT == 0:
                found.append((max(size, (1 + WASTE) * record), count, size))
    if not found:
        raise ValueError(
            f"records of {record} bytes in {layers} full layers do not go with {len(groups[SLIDING_ATTENTION])} "
            f"sliding layers of {numbers} bytes a page"
        )
    return min(found)[2]


def sector_bytes(config: PreTrainedConfig, spec: CacheSpec, dtype: torch.dtype, page_size: int) -> int:
    """What transformers' pool is dealt out in, to layers of all kinds."""
    heads, sizes = find_num_key_value_heads(config), [128]  # its alignment
    for kind, layers in group_layers_by_attn_type(config).items():
        given: Any = (0, config, heads, dtype, page_size, layers, True)
        if kind == FULL_ATTENTION:
            sizes.append(RecordsAllocator(*given, spec=spec).bytes_per_block)
        else:
            sizes.append(ATTN_TYPE_TO_ALLOCATOR[kind](*given).bytes_per_block)
    return math.lcm(*sizes)


def dense_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """PAGE tokens of all layers as numbers: what transformers counts num_blocks in, for such a page_size."""
    layer = FullAttentionCacheAllocator.get_bytes_per_page(
        find_num_key_value_heads(config), find_head_dim(config), dtype, PAGE
    )
    return config.num_hidden_layers * layer


_lock = threading.Lock()


@contextmanager
def allocating(make: Callable[..., FullAttentionCacheAllocator]) -> Iterator[None]:
    """Within it, caches that this thread makes have their full-attention layers from `make`; other threads' do not."""
    with _lock:
        usual = ATTN_TYPE_TO_ALLOCATOR[FULL_ATTENTION]
        thread = threading.get_ident()

        def choose(**given: Any) -> FullAttentionCacheAllocator:
            return (make if threading.get_ident() == thread else usual)(**given)

        choose.supports_block_table = usual.supports_block_table  # type: ignore[attr-defined]
        ATTN_TYPE_TO_ALLOCATOR[FULL_ATTENTION] = choose  # type: ignore[assignment]
        try:
            yield
        finally:
            ATTN_TYPE_TO_ALLOCATOR[FULL_ATTENTION] = usual
