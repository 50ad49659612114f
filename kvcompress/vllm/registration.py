"""What of vLLM's plugin interface is used, checked before it is."""

from __future__ import annotations

import logging

import vllm
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from kvcompress.vllm.settings import VARIABLE, chosen

logger = logging.getLogger("vllm.kvcompress")

BACKEND = "kvcompress.vllm.backend.KVCompressBackend"
NEEDED = ("customize_spec", "supported_kv_cache_layouts", "get_supported_kernel_block_sizes")


def register_backends() -> None:
    """Register the backend as CUSTOM, and on CPUs in place of vLLM's. Raises RuntimeError for an unfit vLLM."""
    missing = [name for name in NEEDED if not hasattr(AttentionBackend, name)]
    if missing:
        raise RuntimeError(
            f"vLLM {vllm.__version__} has no AttentionBackend.{missing[0]}, which packed blocks need: "
            f"take vLLM 0.32 or later, or unset {VARIABLE}"
        )
    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)
    else:
        logger.warning("kvcompress: without --attention-backend CUSTOM vLLM's own cache is used, uncompressed")
    logger.info("kvcompress: blocks of %s for --attention-backend CUSTOM", chosen())
