"""The cache that a model sees while it decodes statically: every layer a `StaticDecode` behind a handle.

It tells the host nothing that changes from step to step: no mask, no length. Rows' padding, which is not stored, needs
none, and positions come with the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from kvcompress.attention import NAME, KVHandle, OutputMetric
from kvcompress.reference import Scores
from kvcompress.static import StaticDecode, StaticRefusalError


class StaticLayer(CacheLayerMixin):
    """One layer: `update` takes a token's keys and values, [B, H, 1, D], and attention adds and attends them."""

    is_compileable = False  # generate() would make masks, and compile by rules of its own
    is_sliding = False
    is_croppable = False

    def __init__(self, decode: StaticDecode, layer_count: int):
        super().__init__()
        self.decode, self.layer_count = decode, layer_count
        self.token: tuple[Tensor, Tensor] | None = None  # until it is attended
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: it is made from a layer that holds tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.token = key_states, value_states
        key, value = (KVHandle(self, side, tuple(x.shape), key_states) for side, x in enumerate(self.token))
        return key, value

    def attend(self, query: Tensor, mask: Tensor | None, scores: Scores, output_metric: OutputMetric) -> Tensor:
        """Attention over all tokens, the new one included: [B, 1, H*G, D_v]."""
        if mask is not None:
            raise StaticRefusalError("static decoding takes no mask, and the model makes one")
        if self.token is None:
            raise StaticRefusalError("static decoding takes no layer that attends another layer's keys")
        (key, value), self.token = self.token, None
        return self.decode.step(query, key, value, scores)

    def materialise(self, side: int) -> Tensor:
        raise StaticRefusalError("static decoding takes no model that does more with keys and values than attend")

    def undo(self) -> None:
        """Nothing to do: `StaticModel` rewinds all layers where one of them raises."""

    def get_seq_length(self) -> int:
        raise StaticRefusalError("static decoding takes no model that asks the host for the length of the cache")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return self.decode.capacity


class StaticCache(Cache):
    """See the module."""

    def __init__(self, decodes: Sequence[StaticDecode]):
        self._own = [StaticLayer(decode, len(decodes)) for decode in decodes]
        super().__init__(layers=list(self._own))

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0  # of a mask that is made for the new token alone, and left out

    def finish_step(self) -> None:
        """Raises StaticRefusalError where a layer was given a token that nobody attended."""
        left = [index for index, layer in enumerate(self._own) if layer.token is not None]
        if left:
            raise StaticRefusalError(f"static decoding takes attention by {NAME!r} only, layers {left} had none")

    def drop_step(self) -> None:
        """Forget the tokens that layers were given and nobody attended."""
        for layer in self._own:
            layer.token = None
