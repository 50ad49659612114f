"""The balanced basis: the transform that makes a head's components uncorrelated in the metric by which errors matter.

With C the covariance of the centred vectors and M = L L^T the metric (E[q q^T] for keys, W_o^T W_o for values, the
identity where it is not known) the eigenvectors U of L^T C L give components y = S^-1 U^T L^T x, S their deviations,
strongest first: each matters to attention in proportion to its variance. Scaling a channel of the keys and the queries'
inversely, or of the values and the output projection's, changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress import packing
from kvcompress.codecs import Fit
from kvcompress.codecs.transforms import hadamard_matrix

RIDGE = 0.1  # of the metric's own diagonal, added to it: queries to come are not quite those seen
SHRINKAGE = 0.2  # of the covariance towards a multiple of the identity, in the metric
BASIS_BITS = 4  # of an element of a square basis, whose inverse makes up for the rounding


@dataclass(frozen=True)
class Balanced:
    """The first `rank` balanced components of vectors of `head_dim`, for 0 < rank <= head_dim rounded up to eights.

    mixed: widths of runs of components, each turned by a Hadamard matrix, so that a run's components are alike and
    close to Gaussian; they add up to `rank`. A fit stores the synthesis matrix [D, D] in 4 bits with a scale for each
    row and column; the analysis is the inverse of what is stored, so rounding costs a little balance and nothing else.
    """

    head_dim: int
    mixed: tuple[int, ...]

    @property
    def rank(self) -> int:
        return sum(self.mixed)

    def fit(self, centred: Tensor, metric: Tensor | None) -> Fit:
        synthesis, _ = balance(centred, metric)
        return stored(synthesis @ self._mixing(centred.device).mT)

    def _mixing(self, device: torch.device) -> Tensor:
        """The Hadamard matrices of the runs on the diagonal, [D, D]."""
        runs = [hadamard_matrix(width, device).double() for width in self.mixed]
        rest = self.head_dim - self.rank
        blocks = [*runs, torch.eye(max(rest, 0), dtype=torch.float64, device=device)]
        return torch.block_diag(*blocks)[: self.head_dim, : self.head_dim]

    def analysis(self, fit: Fit, device: torch.device) -> Tensor:
        inverse = torch.linalg.inv(matrix(fit).double()).float()
        return inverse[..., : self.rank, :]

    def synthesis(self, fit: Fit, device: torch.device) -> Tensor:
        return matrix(fit)[..., : self.rank]


def balance(centred: Tensor, metric: Tensor | None) -> tuple[Tensor, Tensor]:
    """(synthesis, analysis), float64 [..., D, D], of all balanced components at unit variance, strongest first."""
    root, covariance = weighted_covariance(centred, metric)
    variances, vectors = components(covariance)
    deviations = variances.sqrt().unsqueeze(-2)
    synthesis = torch.linalg.solve_triangular(root.mT, vectors * deviations, upper=True)
    return synthesis, (vectors / deviations).mT @ root.mT


def weighted_covariance(centred: Tensor, metric: Tensor | None) -> tuple[Tensor, Tensor]:
    """(L, L^T C L) of centred tokens [..., F, D] and their metric [..., D, D] or None: float64 [..., D, D] each."""
    x = centred.double()
    covariance = x.mT @ x / x.shape[-2]
    metric = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device) if metric is None else metric.double()
    diagonal = metric.diagonal(dim1=-2, dim2=-1)
    floor = diagonal.mean(dim=-1, keepdim=True) * 1e-6 + 1e-30
    root = torch.linalg.cholesky(metric + torch.diag_embed(RIDGE * diagonal + floor))
    return root, root.mT @ covariance @ root


def components(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """(variances [..., D], eigenvectors in columns [..., D, D]) of a shrunken covariance, strongest first."""
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    mean = covariance.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
    variances, vectors = torch.linalg.eigh((1 - SHRINKAGE) * covariance + (SHRINKAGE * mean + 1e-30) * eye)
    return variances.flip(-1).clamp_min(1e-30), vectors.flip(-1)


def stored(values: Tensor, name: str = "basis", bits: int = BASIS_BITS) -> Fit:
    """A matrix [..., m, n] as codes of `bits` bits with a scale for each row and column, under names from `name`.

    Rows and columns of the codes are filled up to multiples of eight, in which they are packed.
    """
    rows = values.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-30)
    largest = 2 ** (bits - 1) - 1
    columns = (values / rows).abs().amax(dim=-2, keepdim=True).clamp_min(1e-30) / largest
    rows, columns = rows.float(), columns.float()
    codes = (values / rows / columns).round().clamp(-largest, largest) + largest
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 8, 0, -codes.shape[-2] % 8))
    return {name: packing.pack(codes, bits), f"{name}_rows": rows.squeeze(-1), f"{name}_columns": columns.squeeze(-2)}


def matrix(fit: Fit, name: str = "basis", bits: int = BASIS_BITS) -> Tensor:
    """float32 [..., m, n] of what `stored` keeps."""
    rows, columns = fit[f"{name}_rows"], fit[f"{name}_columns"]
    height, width = rows.shape[-1], columns.shape[-1]
    codes = packing.unpack(fit[name], bits, -(-height // 8) * 8, -(-width // 8) * 8)[..., :height, :width]
    return (codes.float() - (2 ** (bits - 1) - 1)) * rows.unsqueeze(-1) * columns.unsqueeze(-2)
