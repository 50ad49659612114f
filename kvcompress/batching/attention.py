"""The attention of models whose continuous batching works on codes: packed requests, each over its own blocks.

A request's new tokens are attended exactly, what came before them by its codes, a few pages at a time. Layers that
slide keep transformers' cache, which hands out the numbers of a window.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from kvcompress.batching.allocator import RecordsAllocator
from kvcompress.reference import Mask, Scores, attend

#: transformers sizes its tensors by the name: one with "flash" in it is given no mask of all tokens by all columns.
NAME = "kvcompress_flash_batching"
PIECE = 512  # queries of a sliding layer that are attended together: bounds their mask


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **given: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [1, H*G, T, D] of all requests' new tokens to ([1, T, H*G, D], None).

    given: the paged cache, and where each request's tokens stand. Raises ValueError without a cache, as in a plain
    forward pass while a manager runs, or of a model that does not hand its arguments on to its attention.
    """
    cache: Any = given.get("cache")
    if cache is None:
        raise ValueError(
            f"{type(module).__name__} attends without a paged cache: either this model is in a continuous batching "
            "session and used otherwise before its manager has stopped, or it does not tell its attention of the cache"
        )
    layer: int = module.layer_idx  # type: ignore[assignment]
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    allocator = cache.layer_to_allocator[layer]
    if isinstance(allocator, RecordsAllocator):
        out = _on_codes(allocator, layer, query, key, value, scores, given)
    else:
        window = getattr(allocator, "sliding_window", None)
        key, value = cache.update(key_states=key, value_states=value, layer_idx=layer, kwargs=given)
        out = _on_numbers(query, key, value, scores, given, window)
    return out.unsqueeze(0), None


def _on_codes(
    allocator: RecordsAllocator,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Scores,
    given: dict[str, Any],
) -> Tensor:
    """[T, H*G, D] of a layer of codes, into which the new tokens are written."""
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    step, blocks = allocator.enter(layer, given), allocator.blocks[layer]
    allocator.write(layer, key, value, given["write_index"][allocator.index])
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    allocator.attention[layer].attend(query, key, value, blocks, step, scores, out)
    return out


def _on_numbers(
    query: Tensor, key: Tensor, value: Tensor, scores: Scores, given: dict[str, Any], window: int | None
) -> Tensor:
    """[T, H*G, D] of a layer whose cache gave each request's own columns of key, value [1, H, columns, D]."""
    queries, columns = given["cu_seq_lens_q"].tolist(), given["cu_seq_lens_k"].tolist()
    out = query.new_zeros(query.shape[2], query.shape[1], value.shape[-1])
    for first, stop, begin, end in zip(queries, queries[1:], columns, columns[1:], strict=False):
        for start in range(first, stop, PIECE):
            tokens = slice(start, min(start + PIECE, stop))
            last = end - (stop - tokens.stop)  # columns up to the piece's last token
            own = last - (tokens.stop - tokens.start)
            least = begin if window is None else max(begin, own - window + 1)
            mask = Mask(_window(own - least, last - least, window, query.device), causal=True)
            seen = slice(least, last)
            out[tokens] = attend(query[:, :, tokens], None, key[:, :, seen], value[:, :, seen], mask, scores)[0]
    return out


def _window(own: int, columns: int, window: int | None, device: torch.device) -> Tensor | None:
    """bool [1, 1, Q, columns]: columns within the window of queries that stand from `own` on; None where all are."""
    if window is None or columns <= window:
        return None
    column = torch.arange(columns, device=device)
    return (column > torch.arange(own, columns, device=device).unsqueeze(1) - window)[None, None]


AttentionInterface.register(NAME, attention_forward)
