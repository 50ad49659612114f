"""By which metric errors of keys matter: E[q q^T], from the queries of a row's first tokens.

Where keys are coded in a frame that turns with their position, the metric has to be that of queries as they look from
there: from a key `distance` tokens back. Nobody knows the distances to come, so they are spread evenly on a log scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvcompress.history import Rotation

FARTHEST = 16  # log2 of the longest distance, in tokens
DISTANCES = 8  # of each query
GOLDEN = 0.6180339887498949


def query_metric(query: Tensor, heads: int) -> Tensor:
    """E[q q^T] of queries [H*G, n, D] of `heads` KV heads: float32 [H, D, D]."""
    own = query.float().unflatten(0, (heads, -1)).flatten(1, 2)
    return own.mT @ own / own.shape[1]


def turned_query_metric(query: Tensor, heads: int, first: int, rotation: Rotation) -> Tensor:
    """The same as seen by the frames of keys before them: queries [H*G, n, D] of tokens first, first + 1, ..."""
    positions = torch.arange(query.shape[1], device=query.device)
    total = torch.zeros((), device=query.device)
    for draw in range(DISTANCES):
        share = (positions * GOLDEN + draw / DISTANCES) % 1
        frames = first + positions - torch.exp2(FARTHEST * share).long()
        seen = rotation.undo(query.float().unsqueeze(0), frames.unsqueeze(0)).squeeze(0)
        total = total + query_metric(seen, heads)
    return total / DISTANCES
