"""Table look-ups, the inner loop of decoding in torch."""

from __future__ import annotations

from torch import Tensor


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index] for a table of one dimension; index_select is about three times as fast on a CPU as table[index]."""
    return table.index_select(0, index.flatten().int()).view(index.shape)
