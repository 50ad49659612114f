"""`lowrank1`..`lowrank256`: the strongest directions of a head only, as float16 or as codes (`lowrank32+trellis4`).

Of the balanced components of a head (codecs/balanced.py) the first R are kept, each scaled to about unit variance:
y = S^-1 U^T L^T (x - mean), the best rank R in the metric by which errors matter. Alone they are stored as float16
without a scale, 16 R / D bits an element. With a codec as its part they are what that codec codes, as if they were
vectors of R dimensions: its own fixed transform (the Hadamard matrix for `trellis` and `lloyd`, none for `fp8` and
`exact`) is composed with the analysis, so it mixes the components before they meet its quantisers and gains.

Keys are coded as they come, after RoPE, which keeps turning them out of the directions that the first tokens had; so
give keys `prerope+lowrankR`. On the embedded model half of the directions, learned from 512 tokens, lose 31% of the
energy of the next 1532 tokens' keys after RoPE and 9% before it (`pytest tests/test_lowrank.py -k embedded`).

When it pays: as a transform before a quantiser, for keys before RoPE, and for keys or values with outlier channels,
which the metric does not notice. Keys after RoPE, values without outliers, and anything stored as float16 alone are
worse than plain `trellis` at equal bits.

What it costs beside the codes, for each row, layer, side and KV head: D R bytes for the synthesis matrix and as many
for the analysis matrix, R rounded up to eights, with their scales. One cannot be had from the other without the metric,
which would take D D numbers. From R = D/2 on the whole basis of D D bytes, whose inverse holds the analysis, is no
larger, and is stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.codecs import Band, Codec, Coded, Fit, Geometry, Transform, register
from kvcompress.codecs.balanced import balance, matrix, stored, weighted_covariance
from kvcompress.codecs.scale import HALF
from kvcompress.codecs.spectral import FIT_TOKENS
from kvcompress.codecs.transforms import LARGEST
from kvcompress.spec import CodecSpec

UNIT = 8  # codes are packed in eights
BASIS_BITS = 8  # of an element: what tilts a direction that is kept lets go of some of its energy for good


@dataclass(frozen=True)
class Half:
    """float16, without a scale, for numbers whose usual scale is one."""

    def encode(self, y: Tensor) -> Coded:
        return {"codes": HALF.encode(y).contiguous()}

    def decode(self, coded: Coded, width: int) -> Tensor:
        return HALF.decode(coded["codes"])

    def vector_bits(self, width: int, dtype: torch.dtype) -> float:
        return HALF.bits * width


@dataclass(frozen=True)
class LowRank:
    """The `rank` strongest balanced components of vectors of `head_dim`, 0 < rank <= head_dim.

    mixing: fixed square transforms of consecutive runs of the components, which add up to `rank`; none leaves them.
    """

    head_dim: int
    rank: int
    mixing: tuple[Transform, ...] = ()

    @property
    def _whole(self) -> bool:
        """Whether the whole basis is stored, rather than `rank` rows of the analysis beside those of the synthesis."""
        return 2 * self.rank >= self.head_dim

    def fit(self, centred: Tensor, metric: Tensor | None) -> Fit:
        synthesis, analysis = balance(centred, metric)
        if self._whole:
            return stored(synthesis, bits=BASIS_BITS)
        pair = synthesis.mT[..., : self.rank, :], analysis[..., : self.rank, :]
        return stored(pair[0], "synthesis", BASIS_BITS) | stored(pair[1], "analysis", BASIS_BITS)

    def analysis(self, fit: Fit, device: torch.device) -> Tensor:
        """Exactly inverse to the synthesis, whatever rounding did to what is stored of both."""
        if self._whole:
            rows = torch.linalg.inv(matrix(fit, bits=BASIS_BITS).double())[..., : self.rank, :]
        else:
            rounded = matrix(fit, "analysis", BASIS_BITS).double()
            rows = torch.linalg.solve(rounded @ self._columns(fit).double(), rounded)
        mixing = self._blocks([run.analysis({}, device) for run in self.mixing], device)
        return rows.float() if mixing is None else mixing @ rows.float()

    def synthesis(self, fit: Fit, device: torch.device) -> Tensor:
        mixing = self._blocks([run.synthesis({}, device) for run in self.mixing], device)
        return self._columns(fit) if mixing is None else self._columns(fit) @ mixing

    def _columns(self, fit: Fit) -> Tensor:
        """The synthesis of the components themselves, [rows, H, head_dim, rank]."""
        if self._whole:
            return matrix(fit, bits=BASIS_BITS)[..., : self.rank]
        return matrix(fit, "synthesis", BASIS_BITS).mT

    def _blocks(self, matrices: list[Tensor | None], device: torch.device) -> Tensor | None:
        """The runs' square matrices on the diagonal, [rank, rank]; None where all are the identity."""
        if all(own is None for own in matrices):
            return None
        filled = [
            torch.eye(run.rank, device=device) if own is None else own
            for run, own in zip(self.mixing, matrices, strict=True)
        ]
        return torch.block_diag(*filled)


def coefficients(
    family: str, rank: int, width: int, part: CodecSpec | None, side: int
) -> tuple[LowRank, tuple[Band, ...], bool]:
    """The transform of vectors of `width` dimensions to `rank`, the bands of what it yields, and whether these code the
    tokens of a page together: those of `part`, or float16.

    Raises ValueError for a rank that a part cannot code, or a part whose transform is not fixed.
    """
    if part is None:
        return LowRank(width, rank), (Band(rank, Half()),), False
    if rank % UNIT:
        raise ValueError(f"{family}{rank}+{part}: the rank must be a multiple of {UNIT} for a codec to code it")
    runs = [_part(family, rank, run, part, side) for run in _runs(rank)]
    bands = tuple(band for run in runs for band in run.bands)
    return LowRank(width, rank, tuple(run.transform for run in runs)), bands, runs[0].page_wise


def _runs(rank: int) -> list[int]:
    """Widths of runs that add up to `rank`, multiples of 8 as alike as can be, none wider than transforms take."""
    count, units = -(-rank // LARGEST), rank // UNIT
    return [UNIT * (units // count + (run < units % count)) for run in range(count)]


def _part(family: str, rank: int, width: int, part: CodecSpec, side: int) -> Codec:
    """The codec of `width` components."""
    codec = part.build(Geometry(width, side))
    plain = type(codec) is Codec and codec.frame == "fixed" and codec.rank == width
    if not plain or codec.transform.fit(torch.zeros(1, 1, 1, width), None):
        raise ValueError(
            f"{family} works on a codec that learns nothing but a mean and works on no other, such as "
            f"{family}{rank}+trellis4 or {family}{rank}+lloyd4, got {part}"
        )
    if codec.bits_per_element(torch.float32) != codec.bits_per_element(torch.float16):
        raise ValueError(
            f"{family}{rank} alone stores float16; {part}, which stores the model's dtype, is no part of it"
        )
    return codec


@register(
    "lowrank", bits=range(1, LARGEST + 1), parts=(0, 1), examples=("lowrank32", "lowrank32+trellis4", "lowrank64")
)
def build(spec: CodecSpec, geometry: Geometry) -> Codec:
    assert spec.bits is not None
    rank, part = int(spec.bits), next(iter(spec.parts), None)
    if rank > geometry.head_dim:
        raise ValueError(f"the rank of lowrank{rank} must be at most head_dim, which is {geometry.head_dim}")
    transform, bands, page_wise = coefficients("lowrank", rank, geometry.head_dim, part, geometry.side)
    return Codec(geometry.head_dim, transform, bands, fit_tokens=FIT_TOKENS, weighted=True, page_wise=page_wise)


def rank_for_energy(x: Tensor, metric: Tensor | None, energy: float, joint: bool) -> int:
    """The least rank, a multiple of 8 where there are so many dimensions, that keeps a share of the energy.

    x: vectors [rows, H, tokens, D]; their mean over a row's tokens counts for nothing, since it is stored. metric:
    [rows or 1, H, D, D] by which errors matter, or None. energy: in 0..1, of all rows and heads together. joint: of the
    basis that all heads share (`jointrank`) rather than of each head's (`lowrank`). Raises ValueError for an energy
    that is not in 0..1.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be a share above 0 and at most 1, got {energy}")
    if joint:
        x, metric = side_by_side(x), None if metric is None else block_diagonal(metric)
    x = x.float()
    _, covariance = weighted_covariance(x - x.mean(dim=-2, keepdim=True), metric)
    variances = torch.linalg.eigvalsh(covariance).flip(-1).clamp_min(0).flatten(0, -2).sum(dim=0)
    kept = variances.cumsum(dim=0) / variances.sum().clamp_min(torch.finfo(variances.dtype).tiny)
    enough = int((kept < energy * (1 - 1e-12)).sum()) + 1  # the last sum is not quite one
    return min(math.ceil(enough / UNIT) * UNIT, x.shape[-1])


def side_by_side(x: Tensor) -> Tensor:
    """The heads' vectors of a token as one: [n, H, tokens, D] to [n, 1, tokens, H*D]."""
    return x.transpose(1, 2).flatten(2).unsqueeze(1)


def block_diagonal(metric: Tensor) -> Tensor:
    """The metric of vectors side by side: [n, H, D, D] to [n, 1, H*D, H*D]; an error of one head meets no other's."""
    eye = torch.eye(metric.shape[1], dtype=metric.dtype, device=metric.device)
    return torch.einsum("nhde,hg->nhdge", metric, eye).flatten(3).flatten(1, 2).unsqueeze(1)
