"""`kvquant2`, `kvquant3`, `kvquant4`: learned levels, keys before RoPE by channel, 1% outliers (arXiv 2401.18079).

Numbers are brought to about -1..1, keys with an offset and a scale for each channel, values with one for each token,
and coded by the nearest of 2^bits levels that k-means finds. The largest numbers of every token, one in a hundred but
one at least, stand aside as they are (16 bits and an index of 8); they count neither for the range nor for the levels.

What differs from the paper: keys' offsets and scales and all levels are learned from a row's own first tokens, one set
of levels for each KV head and side (the paper: offline, for each layer; `basis=FILE` does so too); k-means does not
weigh numbers by the Fisher information, for which there are no gradients at hand; and outliers are a fixed number of
each token's (the paper: those of keys beyond a channel's calibrated threshold), so that all tokens take the same room.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress import packing
from kvcompress.codecs import Codec, Coded, Fit, Geometry, by_page, register
from kvcompress.codecs.lookup import look_up
from kvcompress.codecs.scale import HALF, TINY
from kvcompress.codecs.transforms import Identity
from kvcompress.spec import CodecSpec

FIT_TOKENS = 256
OUTLIERS = 0.01  # of a vector's numbers
OUTLIER_BITS = 16 + 8
RANGE_BITS = 16 + 16
SMALLEST, LARGEST = 8, 256  # head_dim: an index takes one byte
NARROWEST = 1e-3  # least scale of a channel, in the head's mean one: what was constant at first may come to life
ITERATIONS = 50  # of k-means, as many as the paper's code allows
FRACTION, REACH = 28, 1024.0  # k-means adds up integers: numbers of at most REACH in units of 2^-FRACTION


@dataclass(frozen=True)
class KVQuant(Codec):
    """Learned levels and outliers; see the module.

    bits: of a level's code. outliers: numbers of each vector that are kept. per_channel: normalise by the channel's
    range among the first tokens (offset and scale [rows, H, D] in the fit), otherwise by each token's own (stored with
    it in 16 bits each). It has no bands: the levels [rows, H, 2^bits] are part of what is learned.
    """

    bits: int = 3
    outliers: int = 1
    per_channel: bool = True

    def __post_init__(self) -> None:
        if not SMALLEST <= self.head_dim <= LARGEST:
            raise ValueError(f"head_dim must lie in {SMALLEST}..{LARGEST} for this codec, got {self.head_dim}")
        if not 0 <= self.outliers < self.head_dim:
            raise ValueError(f"outliers must be 0 or more and fewer than {self.head_dim}, got {self.outliers}")

    @property
    def padded(self) -> int:
        """Codes of a vector: they are packed in eights."""
        return -(-self.head_dim // 8) * 8

    def fit(self, x: Tensor, metric: Tensor | None = None) -> Fit:
        x = x.float()
        fit: Fit = {}
        if self.per_channel:
            tokens = x.shape[-2]
            beyond = round(tokens * self.outliers / self.head_dim / 2)  # on either side of a channel's range
            low, high = (x.kthvalue(nth, dim=-2).values for nth in (beyond + 1, tokens - beyond))
            scale = (high - low) / 2
            floor = NARROWEST * scale.mean(dim=-1, keepdim=True)
            fit = {"offset": (low + high) / 2, "scale": scale.maximum(floor).clamp_min(TINY)}
        y, places, _ = self._normalise(x, fit)
        kept = torch.ones_like(y, dtype=torch.bool).scatter_(-1, places, False)
        numbers = y[kept].view(*y.shape[:2], -1)
        return {**fit, "levels": learned_levels(numbers, 2**self.bits)}

    def encode(self, x: Tensor, fit: Fit) -> Coded:
        x = x.float()
        y, places, parts = self._normalise(x, fit)
        levels = by_page(fit["levels"], len(x))
        borders = (levels[..., 1:] + levels[..., :-1]) / 2
        codes = torch.searchsorted(borders, y.flatten(-2), out_int32=True).view(y.shape)
        codes = torch.nn.functional.pad(codes, (0, self.padded - self.head_dim))
        parts["codes"] = packing.pack(codes, self.bits)
        if self.outliers:
            parts["outliers"] = HALF.encode(x.gather(-1, places))
            parts["places"] = places.to(torch.uint8)
        return parts

    def decode(self, coded: Coded, fit: Fit) -> Tensor:
        tokens = packing.packed_tokens(coded["codes"].shape[-1], self.padded, self.bits)
        codes = packing.unpack(coded["codes"], self.bits, tokens, self.padded)[..., : self.head_dim]
        pages, heads = codes.shape[:2]
        levels = by_page(fit["levels"], pages)
        first = torch.arange(pages * heads, dtype=torch.int32, device=codes.device) * levels.shape[-1]
        y = look_up(levels.flatten(), codes + first.view(pages, heads, 1, 1))
        offset, scale = self._channel_range(fit, pages) if self.per_channel else _token_range(coded)
        x = y * scale + offset
        if self.outliers:
            x.scatter_(-1, coded["places"].long(), HALF.decode(coded["outliers"]))
        return x

    def bits_per_element(self, dtype: torch.dtype) -> float:
        vector = self.bits * self.padded + self.outliers * OUTLIER_BITS + (0 if self.per_channel else RANGE_BITS)
        return vector / self.head_dim

    def _normalise(self, x: Tensor, fit: Fit) -> tuple[Tensor, Tensor, Coded]:
        """Vectors [pages, H, tokens, D] over their range, where outliers are [.., outliers], and the range's parts."""
        if self.per_channel:
            offset, scale = self._channel_range(fit, len(x))
            y = (x - offset) / scale
            return y, _largest(y.abs(), self.outliers), {}
        places = _largest((x - x.mean(dim=-1, keepdim=True)).abs(), self.outliers)
        low, high = x.scatter(-1, places, torch.inf).amin(dim=-1), x.scatter(-1, places, -torch.inf).amax(dim=-1)
        parts = {"offset": HALF.encode((low + high) / 2), "scale": HALF.encode((high - low) / 2)}
        offset, scale = _token_range(parts)
        return (x - offset) / scale.clamp_min(TINY), places, parts

    @staticmethod
    def _channel_range(fit: Fit, pages: int) -> tuple[Tensor, Tensor]:
        """Offset and scale of every channel, [pages, H, 1, D]."""
        return by_page(fit["offset"], pages).unsqueeze(-2), by_page(fit["scale"], pages).unsqueeze(-2)


def _token_range(coded: Coded) -> tuple[Tensor, Tensor]:
    """Offset and scale of every token, [pages, H, tokens, 1]."""
    return HALF.decode(coded["offset"]).unsqueeze(-1), HALF.decode(coded["scale"]).unsqueeze(-1)


def _largest(size: Tensor, count: int) -> Tensor:
    """Places of the `count` largest of [..., D], of equal ones the first, unlike topk's: int64 [..., count]."""
    size, places = size.clone(), []
    for _ in range(count):
        places.append(size.argmax(dim=-1, keepdim=True))
        size.scatter_(-1, places[-1], -1.0)
    return torch.cat(places, dim=-1) if places else size.new_empty(*size.shape[:-1], 0, dtype=torch.int64)


def learned_levels(numbers: Tensor, count: int) -> Tensor:
    """`count` levels of least squared error for numbers [rows, H, n]: k-means from their quantiles, ascending.

    float32 [rows, H, count]. Sums are of integers, so that no order of addition shows in them.
    """
    ordered = numbers.clamp(-REACH, REACH).double().sort(dim=-1).values
    total = ordered.shape[-1]
    sums = torch.nn.functional.pad((ordered * 2**FRACTION).round().long().cumsum(dim=-1), (1, 0))
    middles = (torch.arange(count, device=numbers.device) * 2 + 1) * total // (2 * count)
    levels = ordered[..., middles]
    for _ in range(ITERATIONS):
        borders = torch.searchsorted(ordered, (levels[..., 1:] + levels[..., :-1]) / 2)
        ends = torch.nn.functional.pad(torch.nn.functional.pad(borders, (1, 0)), (0, 1), value=total)
        held = ends.diff(dim=-1)
        means = sums.gather(-1, ends).diff(dim=-1) / (held.clamp_min(1) * 2.0**FRACTION)
        levels = torch.where(held > 0, means, levels)
    return levels.float()


@register("kvquant", bits=(2, 3, 4))
def build(spec: CodecSpec, geometry: Geometry) -> Codec:
    assert spec.bits is not None
    width, keys = geometry.head_dim, geometry.side == 0
    return KVQuant(
        width,
        Identity(width),
        (),
        centred=False,
        fit_tokens=FIT_TOKENS,
        frame="token" if keys else "fixed",
        bits=int(spec.bits),
        outliers=max(1, round(OUTLIERS * width)),
        per_channel=keys,
    )
