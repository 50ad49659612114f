"""`wrap(model)`: from then on `model.generate(...)` makes a compressed cache by itself and prefills in chunks."""

from __future__ import annotations

import copy
import logging
import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm import tqdm
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel

from kvcompress import prefix_generation, static_generation
from kvcompress.attention import NAME
from kvcompress.cache import CompressedCache
from kvcompress.fingerprint import fingerprint
from kvcompress.parallel import ContextGroup, Group
from kvcompress.prefix_generation import Search
from kvcompress.prefixes import PrefixStore
from kvcompress.spec import DEFAULT_SPEC, CacheSpec
from kvcompress.tiers import Offload

Model = TypeVar("Model", bound=PreTrainedModel)

logger = logging.getLogger(__name__)

PROGRESS_TOKENS = 16_384  # prompts from this length on show a progress bar
_STATE = "_kvcompress"  # a wrapped model's attribute


@dataclass
class _Wrapped:
    """A wrapped model's settings, and the attention that it had before."""

    spec: CacheSpec
    prefill_chunk: int
    attention: str
    static: bool
    group: ContextGroup | None
    prefixes: PrefixStore | None
    offload: Offload | None
    fingerprint: str | None = None  # of the model, from the first time that the store is used on


@dataclass
class _Switch:
    """What attention a config named before the first of the models that share it was wrapped, and how many are."""

    before: str
    models: int


_switches: dict[int, _Switch] = {}  # by the id of a living config


def wrap(
    model: Model,
    spec: CacheSpec | str = DEFAULT_SPEC,
    prefill_chunk: int = 4096,
    static: bool = False,
    group: Group | None = None,
    prefix_store: PrefixStore | None = None,
    offload: Offload | None = None,
) -> Model:
    """Make `model.generate` use a `CompressedCache`; returns the same model.

    A call that brings its own cache, or asks for one (`cache_implementation`, `use_cache=False`), is left as it is.
    Prompts longer than `prefill_chunk` tokens are prefilled in chunks of that many. Wrapping again changes the
    settings. The model's attention is switched to "kvcompress" (models that share its config object included, for which
    it computes the same as before); a model that cannot be switched keeps its own and works on decoded copies.

    static: decode on fixed tensors, with room made for all tokens that may come, so that on a GPU a CUDA graph replays
    the steps (`kvcompress.static_model`). It takes greedy search and sampling, left padding included, of models whose
    layers all have full attention, on one device, with a cache made here or a CompressedCache that the call brings;
    anything else is generated as without it, which is logged once and counted in `cache.stats()`. Steps are static as
    soon as a page is closed. The cache that is returned goes on as any other.

    group: the ranks that hold every context together (`CompressedCache`), all of which call `generate` alike; where
    they sample, with the same seed. Their decoding is never static.

    prefix_store: where prompts are looked up and kept, so that a text that many begin with is read once
    (`kvcompress.prefixes`): prompts of one row, for greedy search and sampling with a cache made here; for anything
    else the store counts why it was passed over. A model whose weights have changed has to be wrapped again.

    offload: budgets of the pages of all caches that are made here, those that are kept after a call included
    (`kvcompress.Offload`); the others wait in the host's memory or in a file. Their decoding is never static.

    Raises TypeError for what is no generating model or no group, ValueError for a bad spec or chunk, a model without
    full attention, or a group that is to use a store.
    """
    if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
        raise TypeError(f"wrap takes a transformers model that can generate, got {type(model).__name__}")
    if model.config.is_encoder_decoder:
        raise ValueError(f"wrap takes decoder-only models, {type(model).__name__} is an encoder-decoder")
    if not isinstance(prefill_chunk, int) or prefill_chunk < 1:
        raise ValueError(f"prefill_chunk must be a positive number of tokens, got {prefill_chunk!r}")
    if group is not None and prefix_store is not None:
        raise ValueError("a prefix store keeps whole contexts, and those of a group are dealt out to ranks: give one")
    spec = CacheSpec.parse(spec)
    CompressedCache(model.config, spec, group, offload)  # raises for what could not be cached
    if _STATE in vars(model):
        attention = getattr(model, _STATE).attention
    else:
        attention = _switch_attention(model)
        for name, function in _METHODS.items():
            setattr(model, name, types.MethodType(function, model))
    context = ContextGroup.of(group)
    setattr(model, _STATE, _Wrapped(spec, prefill_chunk, attention, static, context, prefix_store, offload))
    return model


def unwrap(model: Model) -> Model:
    """Undo `wrap`; a model that is not wrapped is returned as it is."""
    if _STATE in vars(model):
        attention = getattr(model, _STATE).attention
        for name in (_STATE, *_METHODS):
            delattr(model, name)
        _switch_back(model, attention)
    return model


def _text_config(model: PreTrainedModel) -> PreTrainedConfig:
    return model.config.get_text_config(decoder=True)


def _switch_attention(model: PreTrainedModel) -> str:
    """Name our attention in the model's config, unless a model that shares it did; returns what it named before."""
    config = _text_config(model)
    if id(config) not in _switches:
        before = config._attn_implementation or "eager"
        try:
            model.set_attn_implementation(NAME)
        except ValueError as error:
            logger.warning("%s keeps %r attention and works on decoded copies: %s", type(model).__name__, before, error)
            return before
        _switches[id(config)] = _Switch(before, 0)
        weakref.finalize(config, _switches.pop, id(config), None)
    switch = _switches[id(config)]
    switch.models += 1
    return switch.before


def _switch_back(model: PreTrainedModel, attention: str) -> None:
    """Name the former attention again, once no model that shares the config is wrapped (a deep copy shares none)."""
    switch = _switches.get(id(_text_config(model)))
    if switch is not None:
        switch.models -= 1
    if switch is None or not switch.models:
        _switches.pop(id(_text_config(model)), None)
        model.set_attn_implementation(attention)


def _prepare_cache(
    model: Any, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any
) -> Any:
    """transformers' own preparation, and a compressed cache in the place of the dynamic one that it made."""
    given = model_kwargs.get("past_key_values")
    result = type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, generation_mode, *args)
    made = model_kwargs.get("past_key_values")
    if given is None and type(made) is DynamicCache and generation_config.cache_implementation != "offloaded":
        state = getattr(model, _STATE)
        cache = CompressedCache(model.config, state.spec, state.group, state.offload)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache
    used = model_kwargs.get("past_key_values")
    if getattr(model, _STATE).prefixes is not None:
        ours = given is None and isinstance(used, CompressedCache)
        prefix_generation.prepare(generation_config, generation_mode, args[0], ours, _search(model))
    if getattr(model, _STATE).static and isinstance(used, CompressedCache):
        static_generation.prepare(model, generation_config, generation_mode, used)
    return result


def _search(model: Any) -> Search:
    state = getattr(model, _STATE)
    state.fingerprint = state.fingerprint or fingerprint(model)
    return Search(state.prefixes, state.fingerprint)


def _prefill(
    model: Any, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """transformers' own prefill, told to go in chunks where the prompt is long, with a progress bar where very long."""
    search, session = prefix_generation.search_of(generation_config), static_generation.session_of(generation_config)
    if search is not None:
        search.begin(model, input_ids, generation_config, model_kwargs)
    cache = model_kwargs.get("past_key_values")
    chunk = getattr(model, _STATE).prefill_chunk
    mask = model_kwargs.get("attention_mask")
    mask_length = mask.shape[1] if mask is not None else getattr(generation_config, "_mask_length", -1)
    held = cache.get_seq_length() if cache is not None and mask_length == input_ids.shape[1] else 0
    new = input_ids.shape[1] - held  # as transformers counts: input_ids hold the whole text, or the new tokens only
    whole = model_kwargs.get("inputs_embeds") is not None or not isinstance(cache, CompressedCache) or new <= chunk
    if not whole and generation_config.prefill_chunk_size is None:
        generation_config = copy.copy(generation_config)
        generation_config.prefill_chunk_size = chunk
    with _progress(model, new if not whole and new >= PROGRESS_TOKENS else None):
        outputs = type(model)._prefill(model, input_ids, generation_config, model_kwargs, *args, **kwargs)
    if search is not None and isinstance(cache, CompressedCache):
        search.end(input_ids, cache)
    if session is not None and isinstance(cache, CompressedCache):
        session.cache = cache
        session.begin(generation_config.max_length - input_ids.shape[1])
    return outputs


@contextmanager
def _progress(model: Any, tokens: int | None) -> Iterator[None]:
    """Count the tokens that pass through the model's forward; None: no bar."""
    if tokens is None:
        yield
        return
    with tqdm(total=tokens, unit="token", unit_scale=True, desc="prefill") as bar:

        def count(_: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            bar.update(kwargs["input_ids"].shape[1])

        hook = model.register_forward_hook(count, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


#: What of a model is replaced while it is wrapped.
_METHODS = {
    "_prepare_cache_for_generation": _prepare_cache,
    "_prefill": _prefill,
    "_valid_auto_compile_criteria": static_generation.valid_auto_compile_criteria,
    "get_compiled_call": static_generation.get_compiled_call,
    "_optimize_model_for_decode": static_generation.optimize_model_for_decode,
}
