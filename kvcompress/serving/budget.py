"""How long a context may be: by tokens, or by the bytes that its cache would come to at the most."""

from __future__ import annotations

import bisect

import torch
from transformers import PreTrainedConfig

from kvcompress.footprint import Footprint, coding
from kvcompress.planning import BOUNDLESS
from kvcompress.serving.refusal import RefusalError
from kvcompress.spec import CacheSpec
from kvcompress.tracing import load_config, read_layers, trace

UNSAID = 1024  # tokens of an answer where the client does not say, as transformers has it


def footprint(config: PreTrainedConfig, spec: CacheSpec, dtype: torch.dtype) -> Footprint:
    """Bytes of one row's cache by tokens, for a model of this config; raises ValueError where it cannot be traced."""
    config = load_config(config)
    _, cache = trace(config, dtype)
    layers, _ = read_layers(cache, config)
    return Footprint(1, tuple(layers), tuple(coding(x, spec, i, len(layers), dtype) for i, x in enumerate(layers)))


def tokens_within(footprint: Footprint, budget: int) -> int:
    """The most tokens whose compressed cache takes no more than `budget` bytes on the way there."""
    return bisect.bisect_right(range(BOUNDLESS), budget, key=footprint.compressed) - 1


def answer_tokens(prompt: int, wanted: int | None, limit: int | None) -> int:
    """Tokens that an answer may have. wanted: by the client, None: it did not say. limit: of prompt and answer.

    Raises RefusalError (400, context_length_exceeded) where they do not fit.
    """
    least = 1 if wanted is None else wanted
    if limit is not None and prompt + least > limit:
        raise RefusalError(
            400,
            f"This server's maximum context length is {limit} tokens. However, you requested {prompt + least} tokens "
            f"({prompt} in the prompt, {least} for the completion). Please reduce the length of either.",
            "context_length_exceeded",
            "messages",
        )
    if wanted is not None:
        return wanted
    return UNSAID if limit is None else min(UNSAID, limit - prompt)
