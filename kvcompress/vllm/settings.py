"""Which spec vLLM's cache is to have, by the variable KVCOMPRESS_VLLM_SPEC; "default" stands for `paged`'s."""

from __future__ import annotations

import os
from functools import lru_cache

from kvcompress.paged import codecs
from kvcompress.spec import CacheSpec

VARIABLE = "KVCOMPRESS_VLLM_SPEC"


def wanted() -> CacheSpec | None:
    """The spec; None where the variable is unset or empty. Raises ValueError for one that vLLM's cache cannot have."""
    text = os.environ.get(VARIABLE, "").strip()
    return _parse(text) if text else None


@lru_cache
def _parse(text: str) -> CacheSpec:
    return codecs.parse(codecs.DEFAULT if text == "default" else text, f"{VARIABLE}={text}")


def chosen() -> CacheSpec:
    """The spec of a server that runs with one; raises ValueError where the variable was taken away since."""
    spec = wanted()
    if spec is None:
        raise ValueError(f"{VARIABLE} is not set in this process, but the kvcompress backend is in use")
    return spec
