"""What of transformers' continuous batching is built on, none of which it promises to keep."""

from __future__ import annotations

import transformers

from kvcompress import upstream

#: Of transformers: the versions that tests/test_batching.py has passed with.
TRIED = ("5.20.2", "5.21.1", "5.22.2", "5.23.0")
BATCHING = "transformers.generation.continuous_batching"

NAMES: upstream.Names = {
    f"{BATCHING}.cache": {
        "ATTN_TYPE_TO_ALLOCATOR": (),
        "group_layers_by_attn_type": ("config",),
        "PagedAttentionCache.update": ("key_states", "value_states", "layer_idx", "kwargs"),
    },
    f"{BATCHING}.cache_allocators": {
        "FullAttentionCacheAllocator": (
            "index",
            "config",
            "num_key_value_heads",
            "cache_dtype",
            "page_size",
            "layer_indices",
            "allow_block_sharing",
        ),
        "FullAttentionCacheAllocator.get_bytes_per_page": (
            "num_key_value_heads",
            "head_dim",
            "cache_dtype",
            "page_size",
        ),
        "FullAttentionCacheAllocator.register_cache_tensor": (
            "bytes_per_sector",
            "non_trash_bytes",
            "cache_tensor",
            "pool",
        ),
        "FullAttentionCacheAllocator._before_cache_tensor_init": (
            "index",
            "layer_indices",
            "tokens_per_page",
            "bytes_per_page",
            "allow_block_sharing",
        ),
        "FullAttentionCacheAllocator._after_cache_tensor_init": (
            "non_trash_bytes",
            "bytes_per_sector",
            "cache_tensor",
            "pool",
        ),
        "SlidingAttentionCacheAllocator": (),
    },
    f"{BATCHING}.continuous_api": {
        "ContinuousBatchingManager": (
            "model",
            "generation_config",
            "continuous_batching_config",
            "workload_hints",
        ),
        "ContinuousBatchingManager.switch_to_cb_friendly_attn": ("model", "auto_switch_to_flash"),
        "ContinuousBatchingManager.stop": ("block", "timeout", "keep_for_next_session", "hard_stop"),
        "ContinuousBatchingManager.warmup": (),
        "ContinuousBatchingManager.add_request": (
            "input_ids",
            "request_id",
            "max_new_tokens",
            "streaming",
            "eos_token_id",
        ),
        "ContinuousBatchingManager.cancel_request": ("request_id",),
        "ContinuousBatchingManager.register_result_handler": ("request_id", "callback"),
        "ContinuousBatchingManager._create_batch_processor": (),
        "BackgroundThreadStatus.can_accept_new_requests": (),
        "ContinuousBatchProcessor.fail_all_requests": ("error",),
        "ContinuousBatchingManager._generation_loop_body": ("batch_processor", "bootstrapping"),
        "ContinuousBatchingManager._run_generation_loop": (),
        "ContinuousBatchingManager.is_running": (),
    },
    f"{BATCHING}.model_runner": {"infer_max_single_request_tokens": ("cache",)},
    f"{BATCHING}.scheduler": {"Scheduler.reset": ()},
    f"{BATCHING}.utils": {"find_head_dim": ("config",), "find_num_key_value_heads": ("config",)},
}


def check() -> None:
    """Raises ImportError that says what of transformers is not where it was."""
    moved = upstream.missing(NAMES)
    if moved:
        raise ImportError(
            f"continuous batching on codes builds on parts of transformers that version {transformers.__version__}, "
            f"the one here, does not have as they were: {'; '.join(moved)}. It was tried with {', '.join(TRIED)}: "
            f"pip install transformers=={TRIED[-1]}"
        )
