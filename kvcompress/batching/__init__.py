"""transformers' own continuous batching, `model.generate_batch` and its servers, with its paged cache as codes.

    kvcompress.batching.enable(model, "trellis:k4v3")
    outputs = model.generate_batch(inputs=[[1, 2, 3], [1, 2, 5, 8]], max_new_tokens=50)

transformers' scheduler, paging, prefix sharing and chunked prefill go on as before; a block holds several times as many
tokens. It builds on parts of transformers that may move: `requirements` says what is missing where they have.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from transformers import GenerationMixin, PreTrainedModel

from kvcompress.batching import requirements
from kvcompress.memory import MemoryReport
from kvcompress.paged.codecs import DEFAULT, parse
from kvcompress.spec import CacheSpec

if TYPE_CHECKING:
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

Model = TypeVar("Model", bound=PreTrainedModel)

METHOD = "init_continuous_batching"  # of a model: what all ways to its continuous batching go through

__all__ = ["DEFAULT", "disable", "enable", "memory"]


def enable(model: Model, spec: CacheSpec | str = DEFAULT, basis: str | Path | None = None) -> Model:
    """Let the model's continuous batching hold full-attention layers as codes; returns the same model.

    spec: codecs that code tokens one by one, alike in all layers, without sinks or window, for a cache that gives
    tokens slots in any order. basis: a file of `kvcompress calibrate --basis`, where its codecs learn something.
    A chunk's own tokens are attended exactly, what came before them by its codes; sliding layers stay as transformers
    makes them. Sessions that begin from here on use it, with any `ContinuousBatchingConfig` but one with CUDA graphs,
    compilation, asynchronous batches or a page_size that is no multiple of 64. Its num_blocks stay what they are in
    bytes, and hold more tokens. A manager that the model had kept is let go. Enabling again changes the spec. Two
    tokens are generated, to see that the model's attention works so.

    Raises ImportError for a transformers whose parts have moved, TypeError for what is no generating model, ValueError
    for a model that cannot have it (no full attention, latents, tensor parallel, an attention that does not take part)
    and for a spec that it cannot have.
    """
    requirements.check()
    from kvcompress.batching.allocator import layouts
    from kvcompress.batching.manager import init_continuous_batching, probe

    layers, heads, head_dim = _geometry(model)
    found = parse(str(spec), f"spec {str(spec)!r}")
    if basis is not None:
        found = replace(found, basis=str(basis))
    layouts(found, head_dim, heads, model.dtype, layers)  # raises for what could not be coded
    disable(model)
    probe(model, found)
    vars(model)[METHOD] = partial(init_continuous_batching, model, spec=found)
    return model


def disable(model: Model) -> Model:
    """Undo `enable`; a model that is not enabled is returned as it is, but for a kept manager, which is let go."""
    destroy: Any = model.destroy_cached_continuous_batching_manager
    destroy()
    vars(model).pop(METHOD, None)
    return model


def memory(manager: ContinuousBatchingManager) -> MemoryReport:
    """What the requests of a running session hold (`kvcompress.batching.usage.held`)."""
    from kvcompress.batching.usage import held

    return held(manager)


def _geometry(model: Any) -> tuple[list[int], int, int]:
    """The full-attention layers, their KV heads and head_dim; raises as `enable` says."""
    from transformers.generation.continuous_batching.cache import group_layers_by_attn_type
    from transformers.generation.continuous_batching.cache_allocators import FULL_ATTENTION
    from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

    if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
        raise TypeError(f"enable takes a transformers model that can generate, got {type(model).__name__}")
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or not model._can_set_attn_implementation():
        raise ValueError(f"continuous batching takes decoders that look up their attention by name, {name} is none")
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ValueError(f"{name} caches latents (MLA), which transformers' paged cache does not hold")
    if getattr(model, "_device_mesh", None) is not None:
        raise ValueError(f"{name} is sharded over several devices (tensor parallel): codes lie on one so far")
    layers = group_layers_by_attn_type(config).get(FULL_ATTENTION)
    if not layers:
        raise ValueError(f"{name} has no full-attention layer: its cache does not grow with the context")
    return layers, find_num_key_value_heads(config), find_head_dim(config)
