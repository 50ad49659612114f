"""Table look-ups, the inner loop of decoding in torch."""

from __future__ import annotations

from torch import Tensor


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index] for a table of one dimension; on a CPU index_select is the faster way to write it."""
    return table.index_select(0, index.flatten().int()).view(index.shape)
