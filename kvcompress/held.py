"""What a layer holds of its tokens, in each row `sinks | coded pages | recent`: how that is read, cut and moved.

How it grows is `kvcompress.history`. Nothing is changed in place but the pool's free pages and what lies beyond the end
of an address table, so a shallow copy is a snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvcompress.addresses import AddressTable
from kvcompress.codecs import SIDES, Codec, Coded, Fit, within
from kvcompress.parallel import ContextGroup
from kvcompress.store import PAGE, SLOT_OF, PagePool, PageTable

DENSE_PAGES = 64  # pages of every row decoded at a time: bounds the workspace of `dense`


class Derived(Protocol):
    """What a backend makes of a history's fits, and keeps with it."""

    @property
    def tensors(self) -> tuple[Tensor, ...]: ...


class Rotation(Protocol):
    """A model's rotary position embedding of keys [B, H, T, D] at positions int64 [B, T], and its inverse."""

    def apply(self, key: Tensor, positions: Tensor) -> Tensor: ...

    def undo(self, key: Tensor, positions: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Block:
    """Some pages of every row, decoded: keys as `absorb`ed queries want them, values before synthesis.

    key [B, H, T, R_k], value [B, H, T, R_v]; positions int64 [B, T], a token's index among its row's real tokens; valid
    bool [B, T], or None where all are.
    """

    key: Tensor
    value: Tensor
    positions: Tensor
    valid: Tensor | None


class HeldTokens:
    """See the module. `codecs` are those of keys and of values.

    preset: what they have learned before, [1, H, ...], used by every row. rotation: of keys, for codecs with a frame
    that turns; None where keys have none. group: the ranks that pages are dealt out to, None where this one keeps all.
    pool: makes what keeps pages.
    """

    def __init__(
        self,
        key_codec: Codec,
        value_codec: Codec,
        sinks: int,
        window: int,
        *,
        preset: tuple[Fit, Fit] | None = None,
        rotation: Rotation | None = None,
        group: ContextGroup | None = None,
        pool: Callable[[], PagePool] = PagePool,
    ):
        self.codecs = (key_codec, value_codec)
        self.sinks, self.window = sinks, window
        self.preset, self.rotation, self.group, self.new_pool = preset, rotation, group, pool
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.pool = self.new_pool()
        self.table = PageTable.empty(0)
        self._addresses: AddressTable | None = None  # of the table, from its first use on
        self.lengths: list[int] = []  # real tokens of each row
        self.pads: list[int] = []  # columns of left padding before them
        self.sink: tuple[Tensor, ...] = ()  # key, value [B, H, sinks, D], filled from the left
        self.recent: tuple[Tensor, ...] = ()  # key, value [B, H, E, D], filled from the right
        self.queries: list[Tensor] = []  # [H*G, n, D] of each row's first tokens, while a codec waits to be fitted
        self.fits: tuple[Fit, ...] = self.preset or ({}, {})
        self.fit_of: list[int] = []  # each row's place in `fits`, -1 before it is fitted
        self.derived: Derived | None = None

    @property
    def columns(self) -> int:
        """Tokens of every row, padding included: what transformers calls the sequence length."""
        return self.pads[0] + self.lengths[0] if self.lengths else 0

    @property
    def coded(self) -> list[int]:
        """Tokens of each row that are held as codes."""
        return self.table.tokens

    @property
    def stored(self) -> list[int]:
        """Those of each row's coded tokens whose pages are here, and not at another rank."""
        return (self.table.fill * (self.table.ids >= 0)).sum(dim=1).tolist()

    @property
    def held(self) -> list[int]:
        """Tokens of each row that are held exactly in `recent`."""
        return [n - min(n, self.sinks) - c for n, c in zip(self.lengths, self.coded, strict=True)]

    @property
    def _turns(self) -> bool:
        """Whether keys are coded in a frame that turns with their position."""
        return self.rotation is not None and self.codecs[0].frame != "fixed"

    def _frames(self, first: Tensor, tokens: int) -> Tensor:
        """The positions [n, tokens] whose frames keys are coded in, for pages that start at positions `first` [n]."""
        slots = torch.arange(tokens, device=first.device)
        if self.codecs[0].frame == "page":
            slots = slots // PAGE * PAGE + PAGE // 2
        return first.unsqueeze(1) + slots

    def row_fit(self, side: int) -> Fit:
        """What was learned of one side (0: keys, 1: values), each [B, H, ...], or [1, H, ...] where rows share it.

        A row without codes gets another row's, which it has no use for; where no row has codes the result means
        nothing.
        """
        owners = [max(place, 0) for place in self.fit_of]
        fit = self.fits[side]
        if not any(self.coded) or all(len(t) == 1 or owners == list(range(len(t))) for t in fit.values()):
            return fit
        return {name: tensor[owners] for name, tensor in fit.items()}

    def blocks(self, pages: int) -> Iterator[Block]:
        """All coded tokens that are here, at most `pages` pages of every row at a time."""
        fits, own = (self.row_fit(0), self.row_fit(1)), slice(None) if self.group is None else self.group.columns
        all_ids, all_fill, start_of_page = (x[:, own] for x in (self.table.ids, self.table.fill, self.starts()))
        most = int((all_ids >= 0).sum(dim=1).max()) if all_ids.numel() else 0
        spans = [all_ids[:, first : first + pages] for first in range(0, most, pages)]
        groups = [ids.where(ids >= 0, ids.max()).flatten() for ids in spans]  # a row without pages reads another's
        for first, ids, coded in zip(range(0, most, pages), spans, self.pool.stream(groups), strict=True):
            fill = all_fill[:, first : first + pages]
            device, slots = self.recent[0].device, torch.arange(PAGE)
            starts = start_of_page[:, first : first + pages]
            positions = (starts.unsqueeze(2) + slots).flatten(1).to(device)
            full = bool((fill == PAGE).all())
            valid = None if full else (slots < fill.unsqueeze(2)).flatten(1).to(device)
            key, value = (self._decode(coded, side, fits[side], len(ids)) for side in (0, 1))
            if self._turns:
                assert self.rotation is not None
                frames = self._frames(starts.flatten(), PAGE).view(positions.shape).to(device)
                key = self.rotation.apply(self.codecs[0].restore(key, fits[0]), frames)
            yield Block(key, value, positions, valid)

    def starts(self) -> Tensor:
        """Where every page's first token stands among its row's real tokens, int64 [B, pages] on the CPU."""
        sinks = torch.tensor([min(n, self.sinks) for n in self.lengths], dtype=torch.int64).unsqueeze(1)
        return self.table.fill.cumsum(dim=1) - self.table.fill + sinks

    def addresses(self) -> AddressTable:
        """Where the pages of every row lie on the codes' device, for kernels; kept up from the first call on."""
        if self._addresses is None:
            named = self.table.ids >= 0
            pages = self.pool.addresses(self.table.ids[named]), self.starts()[named], self.table.fill[named]
            empty = AddressTable.empty(len(self.lengths), self.recent[0].device)
            self._addresses = empty.append(named.sum(dim=1).tolist(), *pages)
        return self._addresses

    def tables(self) -> list[Tensor]:
        """All tensors that say where pages lie."""
        addresses = () if self._addresses is None else self._addresses.tensors
        return [self.table.ids, self.table.fill, *self.pool.index(), *addresses]

    def absorb(self, query: Tensor, fit: Fit) -> tuple[Tensor, Tensor | None]:
        """Query [B, H, n, D] to ([B, H, n, R_k], what to add to all its scores [B, H, n, 1]) for `blocks`' keys.

        fit: the `row_fit` of keys.
        """
        return (query, None) if self._turns else self.codecs[0].absorb(query, fit)

    @property
    def ranks(self) -> tuple[int, int]:
        """Dimensions of the keys and of the values of `blocks`."""
        key, value = self.codecs
        return key.head_dim if self._turns else key.rank, value.rank

    def _decode(self, coded: Coded, side: int, fit: Fit, rows: int) -> Tensor:
        y = self.codecs[side].decode(within(coded, f"{SIDES[side]}."), fit)
        y = y[:, :, list(SLOT_OF)] if side else y
        return y.unflatten(0, (rows, -1)).transpose(1, 2).flatten(2, 3)

    def restored(self, block: Block, side: int, fit: Fit) -> Tensor:
        """One side of a block as the model had made it, float32 [B, H, T, D]. fit: the `row_fit` of that side."""
        tokens = (block.key, block.value)[side]
        return tokens if side == 0 and self._turns else self.codecs[side].restore(tokens, fit)

    def dense(self, side: int) -> Tensor:
        """All tokens of one side as [B, H, columns, D] in the model's dtype; zeros stand for padding.

        Ranks that share a context all have to call this.
        """
        recent, sink = self.recent[side], self.sink[side]
        result = recent.new_zeros(*recent.shape[:2], self.columns, recent.shape[3])
        pads, fit = torch.tensor(self.pads, device=recent.device).unsqueeze(1), self.row_fit(side)
        for block in self.blocks(DENSE_PAGES):
            tokens = self.restored(block, side, fit).to(recent.dtype)
            valid = torch.ones_like(block.positions, dtype=torch.bool) if block.valid is None else block.valid
            rows, places = valid.nonzero(as_tuple=True)
            result[rows, :, (block.positions + pads)[rows, places]] = tokens[rows, :, places]
        if self.group is not None:
            result = self.group.total(result)
        held = self.held
        for row, (pad, length) in enumerate(zip(self.pads, self.lengths, strict=True)):
            sinks = min(length, self.sinks)
            result[row, :, pad : pad + sinks] = sink[row, :, :sinks]
            result[row, :, self.columns - held[row] :] = recent[row, :, recent.shape[2] - held[row] :]
        return result

    def crop(self, tokens: int) -> None:
        """Drop the last `tokens` columns. Raises ValueError where there are fewer; codes are cut short, not changed."""
        if not 0 <= tokens <= self.columns:
            raise ValueError(f"cannot remove {tokens} tokens from a cache of {self.columns}")
        if not tokens:
            return
        over = [max(tokens - h, 0) for h in self.held]
        over = [min(o, c) for o, c in zip(over, self.coded, strict=True)]
        width = self.recent[0].shape[2] - tokens
        self.recent = tuple(x[:, :, : max(width, 0)].clone() for x in self.recent)
        if any(over):
            self.table, self._addresses = self.table.crop(over), None
        lengths = [max(n - tokens, 0) for n in self.lengths]
        self.pads = [p - (tokens - (n - m)) for p, n, m in zip(self.pads, self.lengths, lengths, strict=True)]
        left = [max(n - self.sinks, 0) for n in lengths]
        self.queries = [q[:, :n].clone() for q, n in zip(self.queries, left, strict=True)]
        self.lengths = lengths
        if not self.preset:
            self.fit_of = [place if c else -1 for place, c in zip(self.fit_of, self.coded, strict=True)]
        self._drop_unused_fits()

    def select(self, rows: Tensor) -> None:
        """Keep, repeat or reorder rows: their indices [B'], or bool [B]. Pages are shared, not copied."""
        if not self.lengths:
            return
        held = len(self.lengths)
        rows = (rows.nonzero().flatten() if rows.dtype == torch.bool else rows).cpu()
        wrong = [i for i in rows.tolist() if not -held <= i < held]
        if wrong:
            raise ValueError(f"row {wrong[0]} is not in a batch of {held}")
        rows = rows % held
        order = rows.tolist()
        for name in ("lengths", "pads", "fit_of", "queries"):
            setattr(self, name, [getattr(self, name)[i] for i in order])
        for name in ("sink", "recent"):
            setattr(self, name, tuple(x.index_select(0, rows.to(x.device)) for x in getattr(self, name)))
        self.table = self.table.select(rows)
        self._addresses = None if self._addresses is None else self._addresses.select(rows)
        self._drop_unused_fits()

    def _drop_unused_fits(self) -> None:
        if self.preset:
            return
        kept = sorted({place for place in self.fit_of if place >= 0})
        self.fits = tuple({name: tensor[kept] for name, tensor in fit.items()} for fit in self.fits)
        self.fit_of = [kept.index(place) if place >= 0 else -1 for place in self.fit_of]

    def to(self, device: torch.device | str) -> None:
        """Move all tensors but the page table, which lives on the CPU."""
        self.pool.to(device)
        self._addresses = None
        self.sink = tuple(x.to(device) for x in self.sink)
        self.recent = tuple(x.to(device) for x in self.recent)
        self.queries = [q.to(device) for q in self.queries]
        self.fits = tuple({name: tensor.to(device) for name, tensor in fit.items()} for fit in self.fits)
