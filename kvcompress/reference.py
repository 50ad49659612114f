"""The torch reference of attention over a compressed history: what every backend is compared with.

Queries attend codes block by block, each block decoded and let go, and exact tokens tile by tile; partial results carry
the logarithm of their softmax sum (log-sum-exp) and are merged by it, so no more than `WORKSPACE` elements of scores or
decoded vectors exist at a time. All arithmetic is in float32.

Shapes inside: queries of a KV head side by side, [B, H, G*Q, D]; scores [B, H, G, Q, T].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvcompress.history import History
from kvcompress.store import PAGE

WORKSPACE = 1 << 21  # elements
TILE = 1024  # exact tokens attended at a time


@dataclass(frozen=True)
class Scores:
    """How raw products become scores: times `scaling`, soft-capped (Gemma 2), with sink logits (gpt-oss; [H*G])."""

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True)
class Mask:
    """Who may attend whom: `tensor` over all columns (history, then the chunk), and the causal order within the chunk.

    tensor: None; bool [B, columns] (real tokens); or [B, 1 or heads, Q, columns], bool or added to the scores.
    causal: whether a query attends only the chunk's tokens up to its own (a 4D tensor says this by itself).
    """

    tensor: Tensor | None
    causal: bool

    def slice(self, queries: slice) -> Mask:
        if self.tensor is None or self.tensor.ndim == 2:
            return self
        return replace(self, tensor=self.tensor[:, :, queries])

    def at(self, columns: Tensor) -> Tensor | None:
        """The mask of columns [B or 1, T], shaped to broadcast over [B, heads, Q, T]."""
        if self.tensor is None:
            return None
        if self.tensor.ndim == 2:
            return self.tensor.gather(1, columns.expand(len(self.tensor), -1))[:, None, None]
        rows, heads, queries, _ = self.tensor.shape
        return self.tensor.gather(3, columns[:, None, None].expand(rows, heads, queries, -1))


class Partial:
    """A softmax-weighted sum in the making: running maximum, sum and weighted values of queries [B, H, n, ...]."""

    def __init__(self, query: Tensor, width: int):
        self.top = query.new_full((*query.shape[:3], 1), -torch.inf)
        self.total = torch.zeros_like(self.top)
        self.sum = query.new_zeros(*query.shape[:3], width)

    def add(self, scores: Tensor, values: Tensor) -> None:
        """Take in scores [B, H, n, T] of values [B, H, T, width]."""
        top = torch.maximum(self.top, scores.amax(dim=-1, keepdim=True))
        finite = top.masked_fill(top == -torch.inf, 0.0)  # a query that sees nothing has a sum of zero, not NaN
        weights = torch.exp(scores - finite)
        shrink = torch.exp(self.top - finite)
        self.total = self.total * shrink + weights.sum(dim=-1, keepdim=True)
        self.sum = self.sum * shrink + weights @ values
        self.top = top

    def result(self) -> tuple[Tensor, Tensor]:
        """(weighted mean [B, H, n, width], log-sum-exp [B, H, n, 1]); zero and -inf where nothing was seen."""
        return self.sum / self.total.masked_fill(self.total == 0, 1.0), self.top + self.total.log()


def attend(query: Tensor, history: History | None, key: Tensor, value: Tensor, mask: Mask, scores: Scores) -> Tensor:
    """Attention of a chunk's queries [B, H*G, Q, D] over the history and the chunk's own exact key, value [B, H, T, D].

    Returns [B, Q, H*G, D_v] in the query's dtype. Queries are worked on in tiles that keep the scores within WORKSPACE.
    """
    rows, heads, length, _ = query.shape
    tile = max(WORKSPACE // (rows * heads * TILE), 1)
    own = key.shape[2] - length  # chunk tokens before the first query: zero but for plain attention over a whole cache
    parts = [
        _attend_tile(query[:, :, s : s + tile], history, key, value, mask.slice(slice(s, s + tile)), scores, own + s)
        for s in range(0, length, tile)
    ]
    return torch.cat(parts, dim=2).to(query.dtype).transpose(1, 2).contiguous()


def _attend_tile(
    query: Tensor, history: History | None, key: Tensor, value: Tensor, mask: Mask, scores: Scores, offset: int
) -> Tensor:
    """One tile of queries, whose first one stands at chunk token `offset`: [B, H*G, q, D_v], float32."""
    rows, heads, length, width = query.shape
    groups = heads // key.shape[1]
    grouped = query.float().reshape(rows, key.shape[1], groups * length, width)
    results = [_chunk(grouped, key, value, mask, scores, offset, groups, history.columns if history else 0)]
    if history is not None and history.lengths:
        results += [_exact(grouped, history, mask, scores, groups)]
        if history.table.ids.numel():
            results += [_codes(grouped, history, mask, scores, groups)]
    sinks = None if scores.sinks is None else scores.sinks.float().view(1, -1, groups, 1).expand(rows, -1, -1, length)
    merged = merge(results, None if sinks is None else sinks.reshape(rows, -1, groups * length, 1))
    return merged.view(rows, heads, length, -1)


def merge(results: list[tuple[Tensor, Tensor]], sinks: Tensor | None = None) -> Tensor:
    """One weighted mean of partial ones (mean [.., width], log-sum-exp [.., 1]) and sink logits, whose mean is zero."""
    logs = [log for _, log in results] + ([] if sinks is None else [sinks])
    total = torch.logsumexp(torch.cat(logs, dim=-1), dim=-1, keepdim=True)
    total = total.masked_fill(total == -torch.inf, 0.0)
    return torch.stack([mean * torch.exp(log - total) for mean, log in results]).sum(dim=0)


def _finish(raw: Tensor, scores: Scores, mask: Tensor | None, groups: int) -> Tensor:
    """Raw products [B, H, G*Q, T] to masked scores; mask broadcastable to [B, H*G or 1, Q, T]."""
    raw = raw * scores.scaling
    if scores.softcap is not None:
        raw = torch.tanh(raw / scores.softcap) * scores.softcap
    if mask is None:
        return raw
    split = raw.unflatten(2, (groups, -1))
    mask = mask.unflatten(1, (-1, groups)) if mask.shape[1] > 1 else mask.unsqueeze(2)
    masked = split.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else split + mask.float()
    return masked.flatten(2, 3)


def _both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """What two masks allow; the second is boolean."""
    if first is None or second is None:
        return second if first is None else first
    return first & second if first.dtype == torch.bool else first.masked_fill(~second, -torch.inf)


def _chunk(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scores: Scores, offset: int, groups: int, before: int
) -> tuple[Tensor, Tensor]:
    """The chunk's own tokens, in causal order; `before`: columns of history that precede them in the mask."""
    partial = Partial(query, value.shape[-1])
    length = query.shape[2] // groups
    stop = min(offset + length, key.shape[2]) if mask.causal else key.shape[2]
    for start in range(0, stop, TILE):
        tokens = torch.arange(start, min(start + TILE, stop), device=key.device)
        allowed = mask.at(before + tokens.unsqueeze(0).expand(len(key), -1))
        if mask.causal:
            order = tokens <= torch.arange(offset, offset + length, device=key.device).unsqueeze(1)
            allowed = _both(allowed, order[None, None])
        raw = query @ key[:, :, start : start + TILE][:, :, : len(tokens)].float().mT
        partial.add(_finish(raw, scores, allowed, groups), value[:, :, tokens[0] : tokens[-1] + 1].float())
    return partial.result()


def _exact(query: Tensor, history: History, mask: Mask, scores: Scores, groups: int) -> tuple[Tensor, Tensor]:
    """Sinks and recent tokens."""
    partial = Partial(query, history.sink[1].shape[-1])
    for (key, value), columns, valid in _exact_parts(history, query.device):
        for start in range(0, key.shape[2], TILE):
            part = slice(start, start + TILE)
            allowed = _both(mask.at(columns[:, part]), valid[:, None, None, part])
            raw = query @ key[:, :, part].float().mT
            partial.add(_finish(raw, scores, allowed, groups), value[:, :, part].float())
    return partial.result()


def _exact_parts(history: History, device: torch.device) -> Iterator[tuple[tuple[Tensor, ...], Tensor, Tensor]]:
    """(key, value), columns int64 [B, T] and validity [B, T] of the sinks and of the recent tokens."""
    pads = torch.tensor(history.pads, device=device).unsqueeze(1)
    lengths = torch.tensor(history.lengths, device=device).unsqueeze(1)
    held = torch.tensor(history.held, device=device).unsqueeze(1)
    slots = torch.arange(history.sinks, device=device)
    if history.sinks:
        yield history.sink, (pads + slots).clamp_max(history.columns - 1), slots < lengths
    width = history.recent[0].shape[2]
    if width:
        slots = torch.arange(width, device=device)
        columns = (history.columns - width + slots).clamp_min(0).expand(len(pads), -1)
        yield history.recent, columns, slots >= width - held


def _codes(query: Tensor, history: History, mask: Mask, scores: Scores, groups: int) -> tuple[Tensor, Tensor]:
    """Coded tokens: the query absorbs the keys' synthesis, the sum over values is restored once at the end."""
    key_codec, value_codec = history.codecs
    value_fit = history.row_fit(1)
    absorbed, bias = key_codec.absorb(query, history.row_fit(0))
    pads = torch.tensor(history.pads, device=query.device).unsqueeze(1)
    partial = Partial(query, value_codec.transform.rank)
    rows, heads, queries, _ = query.shape
    width = max(key_codec.transform.rank, value_codec.transform.rank, queries)
    for block in history.blocks(max(WORKSPACE // (rows * heads * PAGE * width), 1)):
        columns = (block.positions + pads).clamp_max(history.columns - 1)
        valid = None if block.valid is None else block.valid[:, None, None]
        raw = absorbed @ block.key.mT
        raw = raw if bias is None else raw + bias
        allowed = _both(mask.at(columns), valid)
        partial.add(_finish(raw, scores, allowed, groups), block.value)
    mean, log = partial.result()
    return value_codec.restore(mean, value_fit), log
