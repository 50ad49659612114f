"""How long a context may be: by tokens, or by the bytes that its cache, or all requests' together, come to at most."""

from __future__ import annotations

import bisect

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from kvcompress.batching.allocator import TRASH, dense_bytes, sector_bytes
from kvcompress.footprint import Footprint, coding
from kvcompress.planning import BOUNDLESS
from kvcompress.serving.call import Call, current
from kvcompress.serving.metrics import Metrics
from kvcompress.serving.refusal import RefusalError
from kvcompress.spec import CacheSpec
from kvcompress.store import PAGE
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


def pool(model: PreTrainedModel, spec: CacheSpec, budget: int | None, chunk: int) -> ContinuousBatchingConfig:
    """Of continuous batching: a pool of at most `budget` bytes (None: as much of the GPU as is free), whose steps read
    up to `chunk` tokens.

    Raises ValueError for a budget that holds no block of a page of every layer, and for none on a CPU.
    """
    config = ContinuousBatchingConfig(page_size=PAGE, max_batch_tokens=chunk, per_request_processors=True)
    if budget is None:
        if model.device.type == "cpu":
            raise ValueError("on a CPU continuous batching is told what its pool may take: --cache-budget BYTES")
        return config
    text = model.config.get_text_config(decoder=True)
    sector = sector_bytes(text, spec, model.dtype, PAGE)
    dense = dense_bytes(text, model.dtype)
    config.num_blocks = max(budget // sector - TRASH, 0) * sector // dense  # in blocks of numbers, rounded down
    if not config.num_blocks:
        least = (TRASH - (-dense // sector)) * sector
        raise ValueError(f"a pool of {budget} bytes is too small for this model: {least} would hold a page of it")
    return config


def asked(model: str, prompt: int) -> Call:
    """The request that is being handled, now known to be the model's. Raises RefusalError (400) without a prompt."""
    call = current.get()
    if call is None:
        raise RuntimeError("a request came to the generation by a way that is not watched")
    call.model = model
    if not prompt:
        raise RefusalError(400, "the prompt has no tokens")
    return call


def admit(call: Call, gen_config: GenerationConfig, prompt: int, limit: int | None, metrics: Metrics) -> int:
    """Let the request wait for its turn; returns its answer's tokens, which handlers read in gen_config too.

    Raises RefusalError as `answer_tokens` does.
    """
    tokens = answer_tokens(prompt, wanted_tokens(call, gen_config, prompt), limit)
    gen_config.max_new_tokens = tokens
    call.admitted = True
    metrics.wait(call)
    return tokens


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


def wanted_tokens(call: Call, gen_config: GenerationConfig, prompt: int) -> int | None:
    """Tokens of the answer that the client asked for at most; None where it did not say.

    Raises RefusalError (400) for what is no number of tokens: JSON knows 2.5 and NaN, which no answer comes to.
    """
    if not call.bounded:
        return None
    for name in ("max_new_tokens", "max_length"):
        given = getattr(gen_config, name)
        if given is not None and type(given) is not int:
            message = f"{name} is a whole number, got {given!r}"
            raise RefusalError(400, message, param="generation_config")
    if gen_config.max_new_tokens is None and gen_config.max_length is not None:
        return max(gen_config.max_length - prompt, 1)
    return gen_config.max_new_tokens


def positions(model: PreTrainedModel) -> int | None:
    """The most tokens that a model with a learned table of positions can be given (GPT-2, OPT); None for others.

    OPT's and BioGPT's tables have two entries more than there are positions.
    """
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tables = [part for part in model.modules() if isinstance(part, nn.Embedding)]
    sizes = {part.num_embeddings for part in tables if part is not model.get_input_embeddings()}
    return most if most is not None and sizes & {most, most + 2} else None
