"""The attention backend that vLLM calls: its classes, and what it refuses. `registration` makes it known."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from kvcompress.paged.attention import BlockAttention
from kvcompress.paged.blocks import BlockLayout
from kvcompress.paged.codecs import codecs
from kvcompress.paged.rows import Step
from kvcompress.reference import Scores
from kvcompress.store import PAGE
from kvcompress.vllm.settings import VARIABLE, chosen


class KVCompressBackend(AttentionBackend):
    """Blocks of PAGE tokens as codes; vLLM's cache is told the bytes that they take."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        """CUSTOM, the name that vLLM keeps for plugins."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[KVCompressImpl]:
        return KVCompressImpl

    @staticmethod
    def get_builder_cls() -> type[KVCompressBuilder]:
        return KVCompressBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        """Pages of codes are of PAGE tokens; vLLM cuts its own blocks, which may be multiples, into these."""
        return [PAGE]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Every layer's blocks by themselves, so that blocks can be cut, and each block whole."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        """Learned sink logits (gpt-oss)."""
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Requests are cut by the lengths on the CPU."""
        return False

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """The bytes of a token and KV head, keys and values together. Raises ValueError for unequal head sizes."""
        if spec.state_content_bytes is not None:
            return spec
        if spec.head_size_v != spec.head_size:
            raise ValueError(f"values of {spec.head_size_v} and keys of {spec.head_size} dimensions do not go together")
        size = sum(codec.size for codec in codecs(chosen(), spec.head_size, spec.num_kv_heads, spec.dtype))
        whole = -(-size // spec.dtype.itemsize) * spec.dtype.itemsize  # vLLM views a cache as numbers of its dtype
        return replace(spec, state_content_bytes=whole)


class KVCompressBuilder(AttentionMetadataBuilder[Step]):
    """A step's requests, sorted once for all layers. Lengths come to the CPU, so no CUDA graph holds attention."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step:
        """Raises NotImplementedError where attention is not causal."""
        if common_attn_metadata.causal is not True:
            raise NotImplementedError("kvcompress attends in causal order only")
        starts = common_attn_metadata.query_start_loc_cpu.tolist()
        return Step(
            common_attn_metadata.block_table_tensor, tuple(starts), tuple(common_attn_metadata.seq_lens.tolist())
        )


class KVCompressImpl(AttentionImpl[Step]):
    """One layer. Raises NotImplementedError for what it cannot attend."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        refused = {
            "ALiBi": alibi_slopes is not None,
            f"attention of type {attn_type}": attn_type != AttentionType.DECODER,
            "layers that share another one's cache": kv_sharing_target_layer_name is not None,
            f"--kv-cache-dtype {kv_cache_dtype}": kv_cache_dtype != "auto",
        }
        for what, found in refused.items():
            if found:
                raise NotImplementedError(f"kvcompress does not take {what}: leave {VARIABLE} unset for this model")
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads or num_heads, head_size
        self.scale, self.kv_cache_dtype = scale, kv_cache_dtype
        self.window = sliding_window if sliding_window and sliding_window > 0 else None
        self.scores = Scores(float(scale), logits_soft_cap or None, sinks)
        self.attention: BlockAttention | None = None

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Code the new tokens, key and value [T, H, D], into their slots."""
        count = len(slot_mapping)
        self._of(layer, key).layout.write(as_blocks(kv_cache), key[:count], value[:count], slot_mapping)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Step | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of query [T, H*G, D] into output [T, H*G, D]; key and value [T, H, D] are written already."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("kvcompress does not quantise its output: switch fuse_attn_quant off")
        if attn_metadata is None:  # vLLM measures how much memory the model takes
            return output.zero_()
        out = output.view(-1, self.num_heads, self.head_size)
        attention = self._of(layer, key)
        attention.attend(query, key, value, as_blocks(kv_cache), attn_metadata, self.scores, out)
        return output

    def _of(self, layer: Any, key: Tensor) -> BlockAttention:
        if self.attention is None:
            spec = chosen()
            index = None if spec.basis == "prompt" else layer_index(layer.layer_name)  # a basis is of one layer
            found = codecs(spec, self.head_size, self.num_kv_heads, key.dtype, index)
            own_key, own_value = (codec.to(key.device) for codec in found)
            self.attention = BlockAttention(BlockLayout(own_key, own_value), self.window)
        return self.attention


def layer_index(name: str) -> int:
    """The layer's number, from a name such as model.layers.3.self_attn.attn; raises ValueError where there is none."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    if len(numbers) != 1:
        raise ValueError(f"expected one number in the name of a layer, got {name!r}")
    return int(numbers[0])


def as_blocks(kv_cache: Tensor) -> Tensor:
    """vLLM's cache of a layer [n, H, PAGE, numbers] as uint8 [n, bytes]; raises ValueError for other blocks."""
    own = kv_cache.view(torch.uint8)
    if own.shape[2] != PAGE or not own[0].is_contiguous():
        raise ValueError(f"blocks must be whole and of {PAGE} tokens, got {tuple(own.shape)} with {own.stride()}")
    return own.as_strided((len(own), own[0].numel()), (own.stride(0), 1))
