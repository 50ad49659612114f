"""`wrap(model, prefix_store=store)`: how `generate` comes to use stored prefixes.

A prompt of one row is looked up before it is prefilled, the rest of it is prefilled after what was found, and what the
cache then holds, before any generated token, is put into the store. What the store is not used for is counted there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationMode

from kvcompress.cache import CompressedCache
from kvcompress.prefixes import PrefixStore

MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_ATTRIBUTE = "_kvcompress_prefix"  # of the copy of a generation config that one call of generate works with
#: What the first call of the model is given (`tokenizer` is for stop strings); with anything else tokens are not all
#: that decides what a cache holds.
INPUTS = frozenset(
    {
        "attention_mask",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "past_key_values",
        "position_ids",
        "return_dict",
        "tokenizer",
        "use_cache",
    }
)


@dataclass
class Search:
    """One call of `generate` that a store is used for. fingerprint: of the model.

    found: tokens of the prompt that came from the store, None where it was not asked.
    """

    store: PrefixStore
    fingerprint: str
    found: int | None = None

    def begin(self, model: Any, ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
        """Put what is stored of the prompt ids [1, N] in the place of the call's empty cache."""
        reason = _refusal(ids, generation_config, model_kwargs)
        if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            reason = "a model whose layers lie on several devices"
        if (getattr(model, "tp_size", None) or 1) > 1:  # ranks that found different lengths would wait for ever
            reason = "a model whose weights are shared out to ranks"
        if reason is not None:
            self.store.pass_over(reason)
            return
        empty = model_kwargs["past_key_values"]
        cache, self.found = self.store.lookup(self.fingerprint, empty.spec, ids, model.config, model.device)
        if cache is not None:
            cache.take_counts(empty)
            if empty.page_offload is not None:
                cache.keep_pages_in(empty.page_offload)
            model_kwargs["past_key_values"] = cache

    def end(self, ids: Tensor, cache: CompressedCache) -> None:
        """Put what the prefill made of the prompt into the store."""
        if self.found is None:
            return
        if cache.get_seq_length() != ids.shape[1]:
            self.store.pass_over("a cache that holds more than the prompt's tokens")
            return
        self.store.put(self.fingerprint, cache.spec, ids, cache, self.found)


def prepare(generation_config: Any, mode: GenerationMode, batch: int, made: bool, search: Search) -> None:
    """Let a call of generate use the store, or count why it does not. made: whether its cache was made here."""
    reason = None
    if not made:
        reason = "a cache of the call's own, or none"
    elif generation_config.is_assistant:
        reason = "generation by an assistant"
    elif mode not in MODES:
        reason = f"generation by {mode.value}"
    elif batch > 1 or (generation_config.num_return_sequences or 1) > 1:
        reason = "several rows"
    if reason is None:
        setattr(generation_config, _ATTRIBUTE, search)
    else:
        search.store.pass_over(reason)


def search_of(generation_config: Any) -> Search | None:
    """What the call of generate that works with this config does with a store."""
    search: Search | None = getattr(generation_config, _ATTRIBUTE, None)
    return search


def _refusal(ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> str | None:
    """Why the prompt's tokens alone do not say what its cache will hold; None where they do."""
    more = sorted(name for name, x in model_kwargs.items() if name not in INPUTS and x is not None and x is not False)
    if more:
        return f"a prompt that comes with {', '.join(more)}"
    mask, positions, length = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids"), ids.shape[1]
    covered = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[-1]
    if covered != length:  # transformers would not leave out the tokens that are held already
        return "a mask of another length than the prompt's"
    if mask is not None and not bool((mask == 1).all()):
        return "padding, or a mask that hides tokens"
    if positions is not None:
        usual = torch.arange(length, device=positions.device)
        if positions.numel() != length or not bool((positions.flatten() == usual).all()):
            return "positions of the call's own"
    return None
