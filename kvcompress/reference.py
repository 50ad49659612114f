"""The torch reference of attention over a compressed history: what every backend is compared with.

Queries attend codes block by block, each block decoded once and let go, and exact tokens tile by tile; partial results
carry the logarithm of their softmax sum (log-sum-exp) and are merged by it. So a block's scores and its decoded vectors
take about `WORKSPACE` elements each (or one page for one query, where that is more). All arithmetic is in float32.

Shapes inside: queries of a KV head side by side, [B, H, G*Q, D]; scores [B, H, G, Q, T].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvcompress import flash
from kvcompress.history import History
from kvcompress.parallel import ContextGroup
from kvcompress.store import PAGE

WORKSPACE = 1 << 21  # elements
TILE = 512  # exact tokens attended at a time
FUSED_WIDTH = 512  # of a block whose scores nobody holds: decoded vectors, with what it takes to decode them


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


@dataclass(frozen=True)
class Tile:
    """Some queries [B, H, G*q, D] with their part of the mask; the first of the q stands at chunk token `offset`."""

    query: Tensor
    mask: Mask
    offset: int
    groups: int

    @property
    def length(self) -> int:
        return self.query.shape[2] // self.groups


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

    def join(self, mean: Tensor, log: Tensor) -> None:
        """Take in another partial result: weighted mean [B, H, n, width] and log-sum-exp [B, H, n, 1], finite."""
        top = torch.maximum(self.top, log)
        weight, shrink = torch.exp(log - top), torch.exp(self.top - top)
        self.total = self.total * shrink + weight
        self.sum = self.sum * shrink + mean * weight
        self.top = top

    def result(self) -> tuple[Tensor, Tensor]:
        """(weighted mean [B, H, n, width], log-sum-exp [B, H, n, 1]); zero and -inf where nothing was seen."""
        return self.sum / self.total.masked_fill(self.total == 0, 1.0), self.top + self.total.log()


def attend(query: Tensor, history: History | None, key: Tensor, value: Tensor, mask: Mask, scores: Scores) -> Tensor:
    """Attention of a chunk's queries [B, H*G, Q, D] over the history and the chunk's own exact key, value [B, H, T, D].

    Returns [B, Q, H*G, D_v] in the query's dtype. Queries are worked on in tiles that keep the scores within WORKSPACE.
    """
    rows, heads, length, _ = query.shape
    banded = mask.tensor is not None and mask.tensor.ndim == 4  # of a sliding layer: small tiles, of which few are seen
    size = TILE if banded else max(WORKSPACE // (rows * heads * TILE), 1)
    groups, own = heads // key.shape[1], key.shape[2] - length
    before = history.columns if history is not None else 0
    tiles = [
        Tile(_grouped(query[:, :, s : s + size], groups), mask.slice(slice(s, s + size)), own + s, groups)
        for s in range(0, length, size)
    ]
    results = [[_chunk(tile, key, value, scores, before)] for tile in tiles]
    if history is not None and history.columns:
        for found, tile in zip(results, tiles, strict=True):
            found.append(_exact(tile, history, scores))
        if any(history.coded):
            codes = _codes(tiles, history, scores)
            if history.group is not None:
                codes = _of_all_ranks(codes, results, tiles, history.group)
            for found, part in zip(results, codes, strict=True):
                found.append(part)
    sinks = None if scores.sinks is None else scores.sinks.float().view(1, -1, groups, 1)
    parts = []
    for found, tile in zip(results, tiles, strict=True):
        own_sinks = None if sinks is None else sinks.expand(rows, -1, -1, tile.length).flatten(2).unsqueeze(-1)
        parts.append(merge(found, own_sinks).reshape(rows, heads, tile.length, -1))
    return torch.cat(parts, dim=2).to(query.dtype).transpose(1, 2).contiguous()


def _grouped(query: Tensor, groups: int) -> Tensor:
    """[B, H*G, q, D] to float32 [B, H, G*q, D]."""
    return query.float().unflatten(1, (-1, groups)).flatten(2, 3)


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


def _unseen(allowed: Tensor | None) -> bool:
    """Whether no query sees any token, where that is known without waiting for a device."""
    return allowed is not None and allowed.dtype == torch.bool and allowed.device.type == "cpu" and not allowed.any()


def _chunk(tile: Tile, key: Tensor, value: Tensor, scores: Scores, before: int) -> tuple[Tensor, Tensor]:
    """The chunk's own tokens, in causal order; `before`: columns of history that precede them in the mask."""
    partial = Partial(tile.query, value.shape[-1])
    stop = min(tile.offset + tile.length, key.shape[2]) if tile.mask.causal else key.shape[2]
    first = _seen_by_all(partial, tile, key, value, scores, min(tile.offset, stop) if tile.mask.causal else stop)
    for start in range(first, stop, TILE):
        part = slice(start, min(start + TILE, stop))
        tokens = torch.arange(part.start, part.stop, device=key.device)
        allowed = tile.mask.at(before + tokens.unsqueeze(0).expand(len(key), -1))
        if tile.mask.causal:
            own = torch.arange(tile.offset, tile.offset + tile.length, device=key.device)
            allowed = _both(allowed, (tokens <= own.unsqueeze(1))[None, None])
        if _unseen(allowed):
            continue
        raw = tile.query @ key[:, :, part].float().mT
        partial.add(_finish(raw, scores, allowed, tile.groups), value[:, :, part].float())
    return partial.result()


def _seen_by_all(partial: Partial, tile: Tile, key: Tensor, value: Tensor, scores: Scores, count: int) -> int:
    """Take in the first `count` tokens, which no causal order hides, where that can be fused: how many were."""
    if tile.mask.tensor is not None or not _fuses(tile, scores):
        return 0
    rows, heads, _, width = key.shape
    piece = max(WORKSPACE // (rows * heads * width), 1)
    for start in range(0, count, piece):
        part = slice(start, min(start + piece, count))
        partial.join(*flash.attend(tile.query, key[:, :, part].float(), value[:, :, part].float(), scores.scaling))
    return count


def _fuses(tile: Tile, scores: Scores) -> bool:
    """Whether tokens that all of a tile's queries see are attended without holding scores."""
    return scores.softcap is None and flash.takes(tile.query)


def _exact(tile: Tile, history: History, scores: Scores) -> tuple[Tensor, Tensor]:
    """Sinks and recent tokens."""
    partial = Partial(tile.query, history.sink[1].shape[-1])
    for (key, value), columns, valid in _exact_parts(history, tile.query.device):
        for start in range(0, key.shape[2], TILE):
            part = slice(start, start + TILE)
            allowed = _both(tile.mask.at(columns[:, part]), valid[:, None, None, part])
            raw = tile.query @ key[:, :, part].float().mT
            partial.add(_finish(raw, scores, allowed, tile.groups), value[:, :, part].float())
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


def _codes(tiles: list[Tile], history: History, scores: Scores) -> list[tuple[Tensor, Tensor]]:
    """Coded tokens, each block decoded once for all tiles; queries absorb the synthesis, sums are restored last."""
    key_fit, value_fit = history.row_fit(0), history.row_fit(1)
    absorbed = [history.absorb(tile.query, key_fit) for tile in tiles]
    partials = [Partial(tile.query, history.ranks[1]) for tile in tiles]
    pads = torch.tensor(history.pads, device=tiles[0].query.device).unsqueeze(1)
    rows, heads, queries, _ = tiles[0].query.shape
    fuses = _fuses(tiles[0], scores)
    width = max(*history.ranks, FUSED_WIDTH if fuses else queries)
    for block in history.blocks(max(WORKSPACE // (rows * heads * PAGE * width), 1)):
        columns = (block.positions + pads).clamp_max(history.columns - 1)
        valid = None if block.valid is None else block.valid[:, None, None]
        for tile, (query, bias), partial in zip(tiles, absorbed, partials, strict=True):
            allowed = _both(tile.mask.at(columns), valid)
            if allowed is None and fuses:
                mean, log = flash.attend(query, block.key, block.value, scores.scaling)
                partial.join(mean, log if bias is None else log + bias * scores.scaling)
                continue
            raw = query @ block.key.mT
            raw = raw if bias is None else raw + bias
            partial.add(_finish(raw, scores, allowed, tile.groups), block.value)
    results = (partial.result() for partial in partials)
    return [(history.codecs[1].restore(mean, value_fit), log) for mean, log in results]


def _of_all_ranks(
    codes: list[tuple[Tensor, Tensor]], exact: list[list[tuple[Tensor, Tensor]]], tiles: list[Tile], group: ContextGroup
) -> list[tuple[Tensor, Tensor]]:
    """Partial results of tiles over this rank's pages to those over all ranks', by one all-reduce.

    What goes through it has queries in the model's order, [B, H*G, Q, ..], since tiles may differ from rank to rank.
    """
    groups, lengths = tiles[0].groups, [tile.length for tile in tiles]

    def joined(parts: Iterable[Tensor]) -> Tensor:
        return torch.cat([part.unflatten(2, (groups, -1)).flatten(1, 2) for part in parts], dim=2)

    seen = (torch.cat([log for _, log in found], dim=-1).logsumexp(dim=-1, keepdim=True) for found in exact)
    own = joined(mean for mean, _ in codes), joined(log for _, log in codes)
    split = (x.split(lengths, dim=2) for x in group.combine(*own, joined(seen)))
    mean, log = ([part.unflatten(1, (-1, groups)).flatten(2, 3) for part in parts] for parts in split)
    return list(zip(mean, log, strict=True))
