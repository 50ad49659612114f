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

from kvcompress.codecs import Fit
from kvcompress.codecs.transforms import hadamard_matrix

RIDGE = 0.01  # of the metric's own diagonal, added to it: queries to come are not quite those seen
SHRINKAGE = 0.02  # of the covariance towards a multiple of the identity, in the metric
LARGEST_CODE = 127


@dataclass(frozen=True)
class Balanced:
    """The first `rank` balanced components of vectors of `head_dim`, for 0 < rank <= head_dim rounded up to eights.

    mixed: widths of runs of components, each turned by a Hadamard matrix, so that a run's components are alike and
    close to Gaussian; they add up to `rank`. A fit stores the synthesis matrix [D, D] in bytes with a scale for each
    row and column; the analysis is the inverse of what is stored, so rounding costs a little balance and nothing else.
    """

    head_dim: int
    mixed: tuple[int, ...]

    @property
    def rank(self) -> int:
        return sum(self.mixed)

    def fit(self, centred: Tensor, metric: Tensor | None) -> Fit:
        x = centred.double()
        covariance = x.mT @ x / x.shape[-2]
        eye = torch.eye(self.head_dim, dtype=torch.float64, device=x.device)
        metric = eye if metric is None else metric.double()
        diagonal = metric.diagonal(dim1=-2, dim2=-1)
        floor = diagonal.mean(dim=-1, keepdim=True) * 1e-6 + 1e-30
        root = torch.linalg.cholesky(metric + torch.diag_embed(RIDGE * diagonal + floor))
        balanced = root.mT @ covariance @ root
        mean = balanced.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
        balanced = (1 - SHRINKAGE) * balanced + (SHRINKAGE * mean + 1e-30) * eye
        variances, vectors = torch.linalg.eigh(balanced)
        vectors = vectors.flip(-1) * variances.flip(-1).clamp_min(1e-30).sqrt().unsqueeze(-2)
        synthesis = torch.linalg.solve_triangular(root.mT, vectors, upper=True) @ self._mixing(x.device).mT
        return _stored(synthesis)

    def _mixing(self, device: torch.device) -> Tensor:
        """The Hadamard matrices of the runs on the diagonal, [D, D]."""
        runs = [hadamard_matrix(width, device).double() for width in self.mixed]
        rest = self.head_dim - self.rank
        blocks = [*runs, torch.eye(max(rest, 0), dtype=torch.float64, device=device)]
        return torch.block_diag(*blocks)[: self.head_dim, : self.head_dim]

    def analysis(self, fit: Fit, device: torch.device) -> Tensor:
        inverse = torch.linalg.inv(_matrix(fit).double()).float()
        return inverse[..., : self.rank, :]

    def synthesis(self, fit: Fit, device: torch.device) -> Tensor:
        return _matrix(fit)[..., : self.rank]


def _stored(matrix: Tensor) -> Fit:
    """A matrix [..., D, D] as bytes with a scale for each row and column."""
    rows = matrix.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-30)
    columns = (matrix / rows).abs().amax(dim=-2, keepdim=True).clamp_min(1e-30) / LARGEST_CODE
    rows, columns = rows.float(), columns.float()
    codes = (matrix / rows / columns).round().to(torch.int8)
    return {"basis": codes, "basis_rows": rows.squeeze(-1), "basis_columns": columns.squeeze(-2)}


def _matrix(fit: Fit) -> Tensor:
    """float32 [..., D, D]."""
    return fit["basis"].float() * fit["basis_rows"].unsqueeze(-1) * fit["basis_columns"].unsqueeze(-2)
