"""One layer's cached tokens: in each row, `sinks | coded pages | recent`.

A row's first `sinks` real tokens and its latest ones stay exact. Whenever `window + PAGE` exact tokens have gathered
after the coded ones, and the codecs' `fit_tokens` have been seen, the oldest PAGE of them become a page. The rule looks
at one row only, so a token's codes depend neither on how the prompt was cut into chunks nor on the other rows. Left
padding is not stored.

Nothing is changed in place but the pool's free pages, so a shallow copy of a `History` is a snapshot of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.codecs import Codec, Coded, Fit
from kvcompress.store import PAGE, PagePool, PageTable

ENCODE_PAGES = 64  # pages coded at a time: bounds the encoder's workspace
SIDES = ("key", "value")


@dataclass(frozen=True)
class Block:
    """Some pages of every row: decoded keys and values (before synthesis), and where their tokens stand.

    key [B, H, T, R_k], value [B, H, T, R_v]; positions int64 [B, T], a token's index among its row's real tokens; valid
    bool [B, T], or None where all are.
    """

    key: Tensor
    value: Tensor
    positions: Tensor
    valid: Tensor | None


class History:
    """See the module. `codecs` are those of keys and of values; rows are made at the first `append`."""

    def __init__(self, key_codec: Codec, value_codec: Codec, sinks: int, window: int):
        self.codecs = (key_codec, value_codec)
        self.sinks, self.window = sinks, window
        self.fit_tokens = max(key_codec.fit_tokens, value_codec.fit_tokens)
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.pool = PagePool()
        self.table = PageTable.empty(0)
        self.lengths: list[int] = []  # real tokens of each row
        self.pads: list[int] = []  # columns of left padding before them
        self.sink: tuple[Tensor, ...] = ()  # key, value [B, H, sinks, D], filled from the left
        self.recent: tuple[Tensor, ...] = ()  # key, value [B, H, E, D], filled from the right
        self.fits: tuple[Fit, ...] = ({}, {})
        self.fit_of: list[int] = []  # each row's place in `fits`, -1 before it is fitted

    @property
    def columns(self) -> int:
        """Tokens of every row, padding included: what transformers calls the sequence length."""
        return self.pads[0] + self.lengths[0] if self.lengths else 0

    @property
    def coded(self) -> list[int]:
        """Tokens of each row that are held as codes."""
        return self.table.tokens

    @property
    def held(self) -> list[int]:
        """Tokens of each row that are held exactly in `recent`."""
        return [n - min(n, self.sinks) - c for n, c in zip(self.lengths, self.coded, strict=True)]

    def append(self, key: Tensor, value: Tensor, real: list[int]) -> None:
        """Add a chunk [B, H, Q, D] whose last `real[row]` tokens are no padding; `code` then codes what is due."""
        rows, length = key.shape[0], key.shape[2]
        if not self.lengths:
            self.lengths, self.pads, self.fit_of = [0] * rows, [0] * rows, [-1] * rows
            self.table = PageTable.empty(rows)
            self.sink = tuple(x.new_zeros(*x.shape[:2], self.sinks, x.shape[3]) for x in (key, value))
            self.recent = tuple(x[:, :, :0] for x in (key, value))
        before = self.lengths
        self.lengths = [n + r for n, r in zip(before, real, strict=True)]
        self.pads = [p + length - r for p, r in zip(self.pads, real, strict=True)]
        self.recent = tuple(torch.cat(pair, dim=2) for pair in zip(self.recent, (key, value), strict=True))
        self._fill_sinks(before, real)

    def code(self, spare: int = 0) -> None:
        """Turn the oldest exact tokens of every row into pages where enough of them have gathered, and let them go.

        spare: tokens to keep exact beside the window.
        """
        if self.lengths:
            self._code(spare)
            width = max(self.held)
            self.recent = tuple(x[:, :, x.shape[2] - width :].clone() for x in self.recent)

    def _fill_sinks(self, before: list[int], real: list[int]) -> None:
        """Move a row's first tokens to its sinks."""
        if min(before) >= self.sinks:
            return
        sink = tuple(x.clone() for x in self.sink)
        for row, (old, new) in enumerate(zip(before, real, strict=True)):
            count = min(self.sinks - old, new)
            if count > 0:
                for side in (0, 1):
                    start = self.recent[side].shape[2] - new
                    sink[side][row, :, old : old + count] = self.recent[side][row, :, start : start + count]
        self.sink = sink

    def _code(self, spare: int) -> None:
        held = self.held
        due = [max(h - self.window - spare, 0) // PAGE for h in held]
        due = [d if n >= self.sinks + self.fit_tokens else 0 for d, n in zip(due, self.lengths, strict=True)]
        if not any(due):
            return
        self._fit([row for row, d in enumerate(due) if d and self.fit_of[row] < 0], held)
        starts = [self.recent[0].shape[2] - h for h in held]
        places = [(row, starts[row] + PAGE * i) for row, d in enumerate(due) for i in range(d)]
        blocks = [self._encode(places[i : i + ENCODE_PAGES]) for i in range(0, len(places), ENCODE_PAGES)]
        coded = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
        self.pool.collect(self.table.ids)
        self.table = self.table.append(self.pool.write(coded), due)

    def _fit(self, rows: list[int], held: list[int]) -> None:
        """Learn what the codecs need from the first tokens after the sinks of rows that have no codes yet."""
        if not rows:
            return
        known = max(self.fit_of) + 1
        fits = []
        for codec, fit, recent in zip(self.codecs, self.fits, self.recent, strict=True):
            starts = [recent.shape[2] - held[row] for row in rows]
            first = [recent[row, :, s : s + codec.fit_tokens] for row, s in zip(rows, starts, strict=True)]
            learned = codec.fit(torch.stack(first))
            fits.append({name: torch.cat([fit[name], new]) if known else new for name, new in learned.items()})
        self.fits = tuple(fits)
        fit_of = list(self.fit_of)
        for place, row in enumerate(rows, start=known):
            fit_of[row] = place
        self.fit_of = fit_of

    def _encode(self, places: list[tuple[int, int]]) -> Coded:
        """The coded parts of pages that start at (row, offset in `recent`), named by side."""
        coded: Coded = {}
        owners = [self.fit_of[row] for row, _ in places]
        for side, codec, recent, fit in zip(SIDES, self.codecs, self.recent, self.fits, strict=True):
            pages = torch.stack([recent[row, :, start : start + PAGE] for row, start in places])
            own = {name: tensor[owners] for name, tensor in fit.items()}
            coded |= {f"{side}.{name}": part for name, part in codec.encode(pages, own).items()}
        return coded

    def row_fit(self, side: int) -> Fit:
        """What was learned of one side (0: keys, 1: values), each [B, H, ...].

        A row without codes gets another row's, which it has no use for; where no row has codes the result means
        nothing.
        """
        owners = [max(place, 0) for place in self.fit_of]
        fit = self.fits[side]
        if not any(self.coded) or all(owners == list(range(len(t))) for t in fit.values()):
            return fit
        return {name: tensor[owners] for name, tensor in fit.items()}

    def blocks(self, pages: int) -> Iterator[Block]:
        """All coded tokens, at most `pages` pages of every row at a time."""
        table = self.table
        sinks = torch.tensor([min(n, self.sinks) for n in self.lengths]).unsqueeze(1)
        start_of_page = table.fill.cumsum(dim=1) - table.fill + sinks
        for first in range(0, table.ids.shape[1], pages):
            ids, fill = table.ids[:, first : first + pages], table.fill[:, first : first + pages]
            coded = self.pool.read(ids.clamp_min(0).flatten())
            device = self.recent[0].device
            slots = torch.arange(PAGE)
            positions = (start_of_page[:, first : first + pages].unsqueeze(2) + slots).flatten(1).to(device)
            full = bool((fill == PAGE).all())
            valid = None if full else (slots < fill.unsqueeze(2)).flatten(1).to(device)
            yield Block(self._decode(coded, 0, len(ids)), self._decode(coded, 1, len(ids)), positions, valid)

    def _decode(self, coded: Coded, side: int, rows: int) -> Tensor:
        prefix = f"{SIDES[side]}."
        own = {name.removeprefix(prefix): part for name, part in coded.items() if name.startswith(prefix)}
        y = self.codecs[side].decode(own)
        return y.unflatten(0, (rows, -1)).transpose(1, 2).flatten(2, 3)

    def dense(self, side: int) -> Tensor:
        """All tokens of one side as [B, H, columns, D] in the model's dtype; zeros stand for padding."""
        recent, sink = self.recent[side], self.sink[side]
        result = recent.new_zeros(*recent.shape[:2], self.columns, recent.shape[3])
        held = self.held
        for row, (pad, length) in enumerate(zip(self.pads, self.lengths, strict=True)):
            sinks = min(length, self.sinks)
            result[row, :, pad : pad + sinks] = sink[row, :, :sinks]
            result[row, :, self.columns - held[row] :] = recent[row, :, recent.shape[2] - held[row] :]
        fit = self.row_fit(side)
        pads = torch.tensor(self.pads, device=recent.device).unsqueeze(1)
        for block in self.blocks(ENCODE_PAGES):
            tokens = self.codecs[side].restore((block.key, block.value)[side], fit).to(recent.dtype)
            valid = torch.ones_like(block.positions, dtype=torch.bool) if block.valid is None else block.valid
            rows, places = valid.nonzero(as_tuple=True)
            result[rows, :, (block.positions + pads)[rows, places]] = tokens[rows, :, places]
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
        self.table = self.table.crop(over)
        lengths = [max(n - tokens, 0) for n in self.lengths]
        self.pads = [p - (tokens - (n - m)) for p, n, m in zip(self.pads, self.lengths, lengths, strict=True)]
        self.lengths = lengths
        self.fit_of = [place if c else -1 for place, c in zip(self.fit_of, self.coded, strict=True)]
        self._drop_unused_fits()

    def select(self, rows: Tensor) -> None:
        """Keep, repeat or reorder rows: their indices [B'], or bool [B]. Pages are shared, not copied."""
        if not self.lengths:
            return
        held = len(self.lengths)
        if rows.dtype == torch.bool:
            rows = rows.nonzero().flatten()
        wrong = [i for i in rows.tolist() if not -held <= i < held]
        if wrong:
            raise ValueError(f"row {wrong[0]} is not in a batch of {held}")
        rows = rows % held
        order = rows.tolist()
        for name in ("lengths", "pads", "fit_of"):
            setattr(self, name, [getattr(self, name)[i] for i in order])
        for name in ("sink", "recent"):
            setattr(self, name, tuple(x.index_select(0, rows.to(x.device)) for x in getattr(self, name)))
        self.table = self.table.select(rows.cpu())
        self._drop_unused_fits()

    def _drop_unused_fits(self) -> None:
        kept = sorted({place for place in self.fit_of if place >= 0})
        self.fits = tuple({name: tensor[kept] for name, tensor in fit.items()} for fit in self.fits)
        self.fit_of = [kept.index(place) if place >= 0 else -1 for place in self.fit_of]

    def to(self, device: torch.device | str) -> None:
        """Move all tensors but the page table, which lives on the CPU."""
        self.pool.to(device)
        self.sink = tuple(x.to(device) for x in self.sink)
        self.recent = tuple(x.to(device) for x in self.recent)
        self.fits = tuple({name: tensor.to(device) for name, tensor in fit.items()} for fit in self.fits)
