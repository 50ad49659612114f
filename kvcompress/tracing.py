"""A model on the meta device, built from its config: its parameters, and what each of its layers would cache."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvcompress.footprint import Layer
from kvcompress.memory import format_bytes

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig

PROBE = 3  # tokens of the forward pass on the meta device


def load_config(source: PreTrainedConfig | str | Path) -> PreTrainedConfig:
    """A copy of a config, or the config of a folder, a config.json or a Hugging Face id.

    Raises OSError where there is none (or, for an id, no network and no cached copy), ValueError for an unknown model.
    """
    from transformers import AutoConfig, PreTrainedConfig

    if isinstance(source, PreTrainedConfig):
        return copy.deepcopy(source)
    if not isinstance(source, str | Path):
        raise TypeError(f"expected a transformers config, a path or a Hugging Face id, got {type(source).__name__}")
    if isinstance(source, Path) or re.match(r"[./~]", source):
        source = str(Path(source).expanduser())
        if not Path(source).exists():
            raise OSError(f"no folder or config.json at {source!r}")
    try:
        return AutoConfig.from_pretrained(source)
    except OSError as error:
        raise OSError(
            f"cannot load a config for {source!r}, which is no folder or config.json here and could not be had from "
            f"the Hugging Face Hub: {str(error).splitlines()[0]}"
        ) from error


def trace(config: PreTrainedConfig, dtype: torch.dtype) -> tuple[Any, Cache]:
    """The model on the meta device, and its DynamicCache after a forward pass of PROBE tokens there."""
    from transformers import DynamicCache

    if config.is_encoder_decoder:
        raise ValueError(f"{config.model_type} is an encoder-decoder model; a plan covers decoder-only models")
    with quiet(), torch.device("meta"), torch.no_grad():
        model = _build(config, dtype)
        cache = DynamicCache(config=config)
        try:
            model(torch.zeros(1, PROBE, dtype=torch.int64), past_key_values=cache, use_cache=True)
        except Exception as error:  # any of a model's own
            raise ValueError(f"cannot trace {config.model_type} on the meta device: {first_line(error)}") from error
    return model, cache


def first_line(error: Exception) -> str:
    """What an error says first, its kind where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _build(config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    autos: list[Any] = [AutoModelForCausalLM, AutoModelForImageTextToText]
    auto = next((auto for auto in autos if type(config) in auto._model_mapping), None)
    if auto is None:
        raise ValueError(f"{config.model_type!r} is no causal language model that this version of transformers knows")
    model = auto.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    model.set_experts_implementation("batched_mm")  # the default looks at the data, of which there is none here
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' warnings, which are about running a model for real."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def read_layers(cache: Cache, config: PreTrainedConfig) -> tuple[list[Layer], list[str]]:
    """The layers of a traced cache, and notes on those that are not compressed."""
    latent = getattr(config.get_text_config(decoder=True), "kv_lora_rank", None) is not None
    layers = [_read_layer(layer, latent) for layer in cache.layers]
    if not any(layer.token_bytes or layer.state_bytes for layer in layers):
        raise ValueError(f"{config.model_type} keeps no cache that a plan could count")
    stock: dict[str, int] = {}
    for layer, held in zip(cache.layers, layers, strict=True):
        if not held.compressed:
            what = _describe(layer, held)
            stock[what] = stock.get(what, 0) + 1
    return layers, [f"{count} of {len(layers)} layers {what}" for what, count in stock.items()]


def _read_layer(layer: Any, latent: bool) -> Layer:
    from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer

    full = type(layer) in (DynamicLayer, LinearAttentionAndFullAttentionLayer)
    sides = _tensors(getattr(layer, name, None) for name in ("keys", "values"))
    states = _tensors(x for name in ("conv_states", "recurrent_states") for x in getattr(layer, name, {}).values())
    growing = [*sides, *_tensors([getattr(layer, "indexer_keys", None)])]
    return Layer(
        heads=sides[0].shape[1] if sides else 0,
        dims=(sides[0].shape[3], sides[1].shape[3]) if sides else (0, 0),
        token_bytes=sum(x.nbytes for x in growing) // PROBE,
        limit=layer.sliding_window if getattr(layer, "is_sliding", False) else None,
        state_bytes=sum(x.nbytes for x in states),
        compressed=full and bool(sides) and not latent,
    )


def _tensors(candidates: Iterable[Any]) -> list[Tensor]:
    return [x for x in candidates if isinstance(x, Tensor)]


def _describe(layer: Any, held: Layer) -> str:
    """What a note says of a layer that is not compressed."""
    if not held.token_bytes and not held.state_bytes:
        return "hold nothing of their own"
    if type(layer).__module__ != "transformers.cache_utils":
        return f"are of a kind of their own ({type(layer).__name__}), counted in part only: read the sizes as too small"
    if held.limit is not None:
        return f"hold at most {held.limit:,} tokens, uncompressed (sliding window)"
    if not held.token_bytes:
        return f"hold a state of {format_bytes(held.state_bytes)} a row whatever the context (linear attention)"
    return f"hold {held.heads * sum(held.dims)} numbers a token uncompressed (latents, which no codec takes yet)"
