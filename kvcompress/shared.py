"""What the layers of one cache have in common (`kvcompress.layer`)."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from kvcompress.layer import CompressedLayer, Transaction
from kvcompress.offloaded import OffloadedPool
from kvcompress.parallel import ContextGroup, digest
from kvcompress.rope import Rope, rotates
from kvcompress.spec import CacheSpec
from kvcompress.store import PagePool
from kvcompress.tiers import Offload


class Shared:
    """Counts of what happened, the forward pass and the model's RoPE.

    group: the ranks that pages are dealt out to, None where this one keeps all. offload: where pages lie, None where
    all are on the device.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        spec: CacheSpec,
        layers: int,
        group: ContextGroup | None = None,
        offload: Offload | None = None,
    ):
        self.config, self.spec, self.layers, self.group, self.offload = config, spec, layers, group, offload
        self.first: int | None = None  # of the compressed layers
        self.counts: Counter[str] = Counter()
        self.transaction = Transaction()
        self._ropes: dict[int, Rope | None] = {}  # by the width of keys

    def rotation(self, layer: int, width: int) -> Rope | None:
        """The rotation of a layer's keys, None where they have none; made once for all layers."""
        if not rotates(self.config, layer):
            return None
        if width not in self._ropes:
            self._ropes[width] = Rope.of(self.config, width, layer)
        return self._ropes[width]

    def pool(self, device: torch.device, pages: PagePool | None = None) -> PagePool:
        """A pool for pages that come from a device, holding `pages` from the start, where they are given."""
        if self.offload is None or isinstance(pages, OffloadedPool):
            return pages or PagePool()
        return OffloadedPool.adopt(self.offload, pages or PagePool(), device)

    def agree(self, layer: CompressedLayer, key: Tensor) -> None:
        """At the first compressed layer, raise ValueError on all ranks unless all begin the same forward pass."""
        if self.group is None or layer.index != self.first:
            return
        config, history = self.config, layer.history
        held = [] if history is None else [history.lengths, history.pads, history.coded]
        facts = {
            "spec": digest(self.spec.to_json()),
            "model": digest(f"{config.model_type} {self.layers} {config._attn_implementation} {key.dtype}"),
            "rows and tokens held": digest(str(held)),
            "rows and tokens of the chunk": digest(str(tuple(key.shape))),
        }
        self.group.agree(facts, key)
