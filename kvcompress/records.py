"""Codes of single tokens, for servers that give tokens slots in any order and teach a codec nothing.

A record is what one token's vector of one head comes to, always as many bytes: a codec's parts one after the other, in
the order of their names. It depends on no other token, so records can be written, moved and shared one by one. Within a
part of packed codes (kvcompress/packing.py) a token has one nibble of every word of its octet, and these nibbles, in
the words' order, are what its record holds: the same bits in another order, whatever the codec makes of them.

Codecs that learn a mean do without it (a mean of zero), or take it from a file that `kvcompress calibrate --basis`
wrote; those that learn a basis need the file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvcompress import backends, packing
from kvcompress.codecs import SIDES, Codec, Coded, Fit, Geometry
from kvcompress.packing import UNIT
from kvcompress.spec import CODECS, CodecSpec
from kvcompress.store import PAGE


@dataclass(frozen=True)
class Part:
    """What a record holds of one of the codec's parts: `size` bytes.

    bits, width: of packed codes; bits is zero where the part has numbers of its own for every token, of `dtype`, in the
    shape `own`.
    """

    name: str
    size: int
    dtype: torch.dtype
    own: tuple[int, ...] = ()
    bits: int = 0
    width: int = 0


@dataclass(frozen=True, eq=False)
class TokenCodec:
    """A codec of one side as records: of `heads` KV heads, `size` bytes for each and token.

    fit: what the codec has learned, each [1, heads, ...]; empty where it needs nothing. counts: how often kernels
    refused to encode, by reason.
    """

    codec: Codec
    fit: Fit
    side: int
    heads: int
    parts: tuple[Part, ...]
    counts: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(
        cls, spec: CodecSpec, geometry: Geometry, dtype: torch.dtype = torch.float32, fit: Fit | None = None
    ) -> TokenCodec:
        """Of vectors of `dtype`, which only `exact` keeps; fit: each [1, heads, ...], on the CPU.

        Raises ValueError, which names the codecs that work, where `spec` does not code tokens one by one.
        """
        found = _build(spec.build(geometry), geometry, dtype, fit or {})
        if isinstance(found, str):
            raise ValueError(
                f"{spec} cannot code the {SIDES[geometry.side]}s of tokens one by one: it {found}. "
                f"These can: {', '.join(working(geometry))}"
            )
        return found

    @property
    def size(self) -> int:
        """Bytes of a token's record of one head."""
        return sum(part.size for part in self.parts)

    def encode(self, x: Tensor) -> Tensor:
        """Records uint8 [T, H, size] of vectors [T, H, D]."""
        tokens = len(x)
        together = UNIT if backends.choose(x.device)[0].name == "torch" else PAGE  # kernels encode whole pages
        padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -tokens % together))
        pages = padded.unflatten(0, (-1, together)).transpose(1, 2).contiguous()
        coded = backends.encode(self.counts, self.codec, self.side, pages, self.fit)
        return self.records(coded, together).transpose(1, 2).flatten(0, 1)[:tokens]

    def decode(self, records: Tensor) -> Tensor:
        """Vectors float32 [T, H, D] of records uint8 [T, H, size]."""
        tokens = len(records)
        padded = torch.nn.functional.pad(records, (0, 0, 0, 0, 0, -tokens % UNIT))
        coded = self.coded(padded.unflatten(0, (-1, UNIT)).transpose(1, 2))
        x = self.codec.restore(self.codec.decode(coded, self.fit), self.fit)
        return x.transpose(1, 2).flatten(0, 1)[:tokens]

    def to(self, device: torch.device) -> TokenCodec:
        """With what was learned on a device, where vectors then come from."""
        return replace(self, fit={name: x.to(device) for name, x in self.fit.items()})

    def records(self, coded: Coded, tokens: int) -> Tensor:
        """Records uint8 [pages, H, tokens, size] of pages of tokens as the codec stores them."""
        found = []
        for part in self.parts:
            stored = coded[part.name]
            if part.bits:
                nibbles = split_tokens(stored, part.bits, tokens, part.width)
                found.append(nibbles[..., 0::2] | nibbles[..., 1::2] << 4)
            else:
                found.append(stored.contiguous().view(torch.uint8).reshape(*stored.shape[:2], tokens, part.size))
        return torch.cat(found, dim=-1)

    def coded(self, records: Tensor) -> Coded:
        """The inverse of `records`: what the codec stores of pages of tokens, [pages, H, ...]."""
        result: Coded = {}
        for part, stored in zip(self.parts, records.split([part.size for part in self.parts], dim=-1), strict=True):
            if part.bits:
                result[part.name] = join_tokens(nibbles_of(stored), part.bits, part.width)
            else:
                numbers = stored.contiguous().view(part.dtype)
                result[part.name] = numbers.reshape(*stored.shape[:3], *part.own)
        return result


def nibbles_of(packed: Tensor) -> Tensor:
    """uint8 [..., n] to its halves, the lower one first: uint8 [..., 2 n] below 16."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def octet_words(words: Tensor, bits: int, tokens: int, width: int) -> Tensor:
    """Words [..., tokens width bits / 32] of packed codes by octet: [..., tokens / 8, width bits / 4].

    Of codes of more than four bits, the words of the low plane come before those of the other.
    """
    if bits > 4:
        low = packing.packed_bytes(tokens, width, 4) // 4
        planes = words[..., :low], words[..., low:]
        return torch.cat([octet_words(p, b, tokens, width) for p, b in zip(planes, (4, bits - 4), strict=True)], dim=-1)
    blocks = words.unflatten(-1, (-1, tokens // UNIT, packing.lanes(width) * bits))  # [.., S, octets, L bits]
    return blocks.transpose(-3, -2).flatten(-2)


def split_tokens(packed: Tensor, bits: int, tokens: int, width: int) -> Tensor:
    """Every token's nibbles uint8 [..., tokens, width bits / 4] of packed codes uint8 [..., bytes]."""
    words = octet_words(packed.contiguous().view(torch.int32), bits, tokens, width)
    shifts = torch.arange(0, 4 * UNIT, 4, dtype=torch.int32, device=packed.device).unsqueeze(-1)
    return (words.unsqueeze(-2) >> shifts & 15).to(torch.uint8).flatten(-3, -2)


def join_tokens(nibbles: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of `split_tokens`, of nibbles uint8 [..., tokens, width bits / 4]."""
    tokens = nibbles.shape[-2]
    shifts = torch.arange(0, 4 * UNIT, 4, dtype=torch.int32, device=nibbles.device).unsqueeze(-1)
    spread = nibbles.unflatten(-2, (-1, UNIT)).int() << shifts
    octets = spread.sum(dim=-2, dtype=torch.int32)  # nibbles lie apart: a sum is an or
    order = octet_words(word_numbers(bits, tokens, width, nibbles.device), bits, tokens, width).flatten()
    words = torch.empty_like(octets.flatten(-2))
    words[..., order] = octets.flatten(-2)
    return words.view(torch.uint8)


def word_numbers(bits: int, tokens: int, width: int, device: torch.device) -> Tensor:
    """int64: the places of the words of packed codes."""
    return torch.arange(packing.packed_bytes(tokens, width, bits) // 4, device=device)


def working(geometry: Geometry) -> Iterator[str]:
    """Examples of the codecs that `TokenCodec.of` takes without a basis."""
    for name in CODECS:
        for example in CODECS[name].examples:
            try:
                codec = CodecSpec.parse(example).build(geometry)
            except ValueError:  # not for such vectors, or its package is missing
                continue
            if isinstance(_build(codec, geometry, torch.float32, {}), TokenCodec):
                yield example


def _build(codec: Codec, geometry: Geometry, dtype: torch.dtype, fit: Fit) -> TokenCodec | str:
    """The codec of records, or why there is none."""
    if reason := _refuses(codec, geometry, fit):
        return reason
    codec = codec if fit else replace(codec, centred=False)
    probe = _probe(geometry).to(dtype)
    whole = codec.encode(probe, fit)
    parts = [_part(name, stored, codec) for name, stored in sorted(whole.items())]
    known = tuple(part for part in parts if part is not None)
    found = TokenCodec(codec, fit, geometry.side, geometry.heads, known)
    return found if len(known) == len(parts) and _by_itself(found, probe, whole) else "codes tokens together"


def _refuses(codec: Codec, geometry: Geometry, fit: Fit) -> str | None:
    """Why a codec cannot code tokens one by one, as far as it says so itself."""
    if type(codec) is not Codec:
        return "codes heads together"
    if codec.page_wise:
        return "codes the tokens of a page together"
    if codec.frame != "fixed":
        return "codes keys in a frame that turns with their position, which a slot does not tell"
    needed = set(codec.fit(_probe(geometry, 2 * geometry.head_dim)))
    if fit and set(fit) != needed:
        return f"learns {', '.join(sorted(needed)) or 'nothing'}, but was given {', '.join(sorted(fit))}"
    if not fit and needed - {"mean"}:
        return "learns from a prompt; `kvcompress calibrate --basis FILE` would learn it once, for basis=FILE"
    return None


def _probe(geometry: Geometry, tokens: int = UNIT) -> Tensor:
    """Some vectors [1, H, tokens, D], the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, geometry.heads, tokens, geometry.head_dim, generator=generator)


def _part(name: str, stored: Tensor, codec: Codec) -> Part | None:
    """What records hold of a part that the codec stores of an octet; None where it is no part of single tokens."""
    index, _, own_name = name.partition(".")
    band = codec.bands[int(index)]
    bits = getattr(band.quantiser, "bits", 0)
    if own_name == "codes" and stored.ndim == 3 and stored.shape[2] * 8 == UNIT * band.width * bits:
        return Part(name, band.width * bits // 8, stored.dtype, (), bits, band.width)
    if stored.ndim < 3 or stored.shape[2] != UNIT:
        return None
    own = tuple(stored.shape[3:])
    return Part(name, math.prod(own) * stored.dtype.itemsize, stored.dtype, own)


def _by_itself(codec: TokenCodec, probe: Tensor, whole: Coded) -> bool:
    """Whether records hold all that the codec stores, and those of some tokens stay as they are when others change."""
    records = codec.records(whole, UNIT)
    again = codec.coded(records)
    same = all(torch.equal(again[name].view(torch.uint8), part.view(torch.uint8)) for name, part in whole.items())
    changed = probe.clone()
    changed[:, :, 1::2] = 3 - 2 * probe[:, :, 1::2].flip(-1)
    others = codec.records(codec.codec.encode(changed, codec.fit), UNIT)
    return same and torch.equal(others[:, :, ::2], records[:, :, ::2])
