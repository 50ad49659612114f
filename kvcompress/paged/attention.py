"""One layer's attention over blocks of codes: write the new tokens, attend what came before, exactly within the chunk.

A request's new tokens are attended exactly, by the keys and values that the model just made; what came before them by
their codes, also where it came with the same prompt in an earlier chunk.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

from kvcompress import backends
from kvcompress.history import Derived
from kvcompress.paged.blocks import BlockHistory, BlockLayout
from kvcompress.paged.rows import Rows, Step
from kvcompress.reference import Scores


@dataclass(eq=False)
class BlockAttention:
    """Of a layer whose tokens see the last `window` ones (None: all). counts: what kernels refused, by reason."""

    layout: BlockLayout
    window: int | None = None
    counts: Counter[str] = field(default_factory=Counter)
    derived: Derived | None = None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, step: Step, scores: Scores, out: Tensor
    ) -> None:
        """Attention of the step's queries [T, H*G, D] into out [T, H*G, D]; key, value [T, H, D] are its own tokens'.

        blocks: uint8 [n, bytes].
        """
        for rows in step.windowed(self.window):
            own = [_of_rows(x, rows) for x in (query, key, value)]
            history = None
            if rows.table.most:
                history = BlockHistory(self.layout, blocks, rows.table, own[1], self.derived)
            found = backends.attend(own[0], history, own[1], own[2], rows.mask(self.window), scores, self.counts)
            out.index_copy_(0, rows.tokens, found.flatten(0, 1).to(out.dtype))
            if history is not None:
                self.derived = history.derived


def _of_rows(x: Tensor, rows: Rows) -> Tensor:
    """The rows' tokens of x [T, heads, D] as [B, heads, queries, D]."""
    return x.index_select(0, rows.tokens).unflatten(0, (-1, rows.queries)).transpose(1, 2)
