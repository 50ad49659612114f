"""Blocks of a server's paged cache as pages of codes: the same record that `PagePool` keeps, written token by token.

A block of PAGE tokens of a layer holds the page's record (kvcompress/record.py): the packed codes of all heads, keys
and values, and their scales. So what reads pages, the torch reference and the kernels, reads blocks. A token owns one
nibble of every word of its octet and shares words with its seven neighbours; a write adds, for every token, the
difference between what its nibble shall be and what it is. Neighbours' differences do not touch, so their order is free
and no token is decoded or moved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from kvcompress.addresses import AddressTable
from kvcompress.codecs import SIDES, Coded
from kvcompress.history import Block, Derived, History
from kvcompress.packing import UNIT
from kvcompress.record import Field, RecordLayout
from kvcompress.records import Part, TokenCodec, nibbles_of, octet_words, word_numbers
from kvcompress.store import PAGE, SLOT_OF, PagePool, PageTable

WORKSPACE = 1 << 20  # nibbles or bytes of records written at a time


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """How blocks hold the records of keys and values; both codecs are of as many heads."""

    key: TokenCodec
    value: TokenCodec

    @property
    def codecs(self) -> tuple[TokenCodec, TokenCodec]:
        return self.key, self.value

    @cached_property
    def record(self) -> RecordLayout:
        """Of a block's parts, named by side."""
        coded: Coded = {}
        for side, codec in zip(SIDES, self.codecs, strict=True):
            empty = torch.zeros(1, codec.heads, PAGE, codec.size, dtype=torch.uint8)
            coded |= {f"{side}.{name}": part for name, part in codec.coded(empty).items()}
        return RecordLayout.of(coded)

    def write(self, blocks: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Code keys and values [T, H, D] into slots int64 [T] of blocks uint8 [n, bytes], in place.

        Slot s is token s % PAGE of block s // PAGE; a negative one drops its token. No two tokens may share a slot.
        Raises ValueError for blocks that are too small for a record.
        """
        if blocks.shape[1] < self.record.page_bytes:
            raise ValueError(f"a block takes {self.record.page_bytes} bytes, got blocks of {blocks.shape[1]}")
        if not len(slots):
            return
        fields = {field.name: field for field in self.record.fields}
        for side, codec, x in zip(SIDES, self.codecs, (key, value), strict=True):
            records = codec.encode(x)
            places = slots % PAGE
            if side == "value":
                places = _slots(slots.device)[places]
            start = 0
            for part in codec.parts:
                own = records[..., start : start + part.size]
                _place(blocks, own, part, fields[f"{side}.{part.name}"], slots, places)
                start += part.size


def _place(blocks: Tensor, records: Tensor, part: Part, field: Field, slots: Tensor, places: Tensor) -> None:
    """Write a part of records [T, H, size] to blocks; places [T]: which of its block's tokens each one is."""
    unit = 4 if part.bits else 1
    flat = torch.as_strided(blocks, (blocks.stride(0) * (len(blocks) - 1) + blocks.shape[1],), (1,))
    flat = flat.view(torch.int32) if part.bits else flat
    heads = records.shape[1]
    at = _words(part, records.device) if part.bits else torch.arange(part.size, device=records.device)
    head = torch.arange(heads, device=records.device).unsqueeze(1) * (field.size // heads // unit)
    start = slots.clamp_min(0) // PAGE * (blocks.stride(0) // unit) + field.offset // unit
    for some in torch.arange(len(slots), device=slots.device).split(max(WORKSPACE // (heads * at.shape[-1]), 1)):
        place, own = places[some], records[some]
        if part.bits:
            within, shift = at[place // UNIT], (place % UNIT * 4).int().view(-1, 1, 1)
            wanted, mask = nibbles_of(own).int() << shift, torch.full_like(shift, 15) << shift
        else:
            within, wanted, mask = at + (place * part.size).unsqueeze(1), own, None
        index = start[some].view(-1, 1, 1) + head + within.unsqueeze(1)
        known = flat[index]
        change = wanted - (known if mask is None else known & mask)  # modulo 2^8 or 2^32
        change = change.masked_fill((slots[some] < 0).view(-1, 1, 1), 0)
        flat.scatter_add_(0, index.flatten(), change.flatten())


@lru_cache
@torch.inference_mode(False)  # kept for ever, so not to be inference tensors
def _slots(device: torch.device) -> Tensor:
    """The slot of every token among a page's values."""
    return torch.tensor(SLOT_OF, device=device)


@lru_cache
@torch.inference_mode(False)
def _words(part: Part, device: torch.device) -> Tensor:
    """Where the words of each octet of a page's codes lie: int64 [octets, words]."""
    return octet_words(word_numbers(part.bits, PAGE, part.width, device), part.bits, PAGE, part.width)


class BlockPool(PagePool):
    """A server's blocks, uint8 [n, bytes], as a pool whose pages are numbered as they are; not to be written to."""

    def __init__(self, layout: RecordLayout, blocks: Tensor):
        super().__init__()
        self.layout, self.slabs = layout, [blocks]

    def read(self, ids: Tensor) -> Coded:
        """Parts [n, H, ...] of blocks."""
        assert self.layout is not None
        return self.layout.views(self.slabs[0][ids.to(self.slabs[0].device)])


@dataclass(frozen=True, eq=False)
class BlockTable:
    """Which blocks hold rows' histories: ids int [B, P] on the blocks' device, and how many tokens of each row."""

    ids: Tensor
    lengths: tuple[int, ...]

    @property
    def most(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths, default=0)

    @cached_property
    def pages(self) -> PageTable:
        """For the torch reference, on the CPU."""
        fills = self.fills.cpu()
        return PageTable(self.ids[:, : fills.shape[1]].cpu().int().masked_fill(fills == 0, -1), fills)

    @cached_property
    def fills(self) -> Tensor:
        """Tokens of every page that count, int32 [B, pages of the longest row]."""
        starts = torch.arange(0, self.most, PAGE)
        lengths = torch.tensor(self.lengths).unsqueeze(1)
        return (lengths - starts).clamp(0, PAGE).to(torch.int32).to(self.ids.device)

    @cached_property
    def _places(self) -> AddressTable:
        """With places among the blocks for addresses: the same for all layers."""
        ids = self.ids[:, : self.fills.shape[1]].long()
        starts = torch.arange(0, self.most, PAGE, dtype=torch.int32, device=ids.device).repeat(len(ids), 1)
        held = tuple(-(-length // PAGE) for length in self.lengths)
        counts = torch.tensor(held, dtype=torch.int32).to(ids.device)
        return AddressTable(ids, starts, self.fills.contiguous(), counts, held)

    def addresses(self, blocks: Tensor) -> AddressTable:
        """For kernels, of a layer's blocks."""
        places = self._places
        return replace(places, addresses=(blocks.data_ptr() + places.addresses * blocks.stride(0)).contiguous())


class BlockHistory(History):
    """Rows whose tokens all lie in blocks, for `backends.attend`: no sinks, no recent tokens, nothing to append to.

    like: a key or value of the chunk that attends them, [B, H, Q, D]. derived: what a backend made of the layer before.
    """

    def __init__(self, layout: BlockLayout, blocks: Tensor, table: BlockTable, like: Tensor, derived: Derived | None):
        key, value = layout.codecs
        super().__init__(key.codec, value.codec, 0, 0, preset=(key.fit, value.fit))
        self.pool = BlockPool(layout.record, blocks)
        self.rows, self.blocks_held = table, blocks
        self.table = table.pages
        self.lengths, self.pads = list(table.lengths), [table.most - length for length in table.lengths]
        self.fit_of = [0] * len(like)
        self.sink = self.recent = (like[:, :, :0], like[:, :, :0])
        self.derived = derived

    def addresses(self) -> AddressTable:
        """Where the pages of every row lie, for kernels."""
        if self._addresses is None:
            self._addresses = self.rows.addresses(self.blocks_held)
        return self._addresses

    def blocks(self, pages: int) -> Iterator[Block]:
        """As `History.blocks`, but zero where nothing was written: what a block held before may be no number."""
        for block in super().blocks(pages):
            if block.valid is not None:
                block = replace(block, value=block.value.masked_fill(~block.valid[:, None, :, None], 0.0))
            yield block
