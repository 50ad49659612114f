"""The vLLM plugin: vLLM's own scheduler, paging, prefix caching and parallelism over blocks of codes.

`KVCOMPRESS_VLLM_SPEC=trellis:k4v3 vllm serve MODEL --attention-backend CUSTOM --block-size 64`

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes. Without the
variable it does nothing.
"""

from __future__ import annotations

from kvcompress.vllm.settings import VARIABLE, wanted

__all__ = ["VARIABLE", "register", "wanted"]


def register() -> None:
    """Make the attention backend known to vLLM, where a spec is wanted.

    On CPUs vLLM takes no other backend than its own, so that is replaced. Raises ValueError for a spec that vLLM's
    cache cannot have, RuntimeError for a vLLM that lacks what the backend needs.
    """
    if wanted() is None:
        return
    from kvcompress.vllm.registration import register_backends

    register_backends()
