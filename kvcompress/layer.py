"""A layer of a compressed cache: one history behind transformers' layer contract, and the undoing of a forward pass.

Within a layer's call `update` keeps the chunk's exact keys and values aside and returns handles; our attention attends
the history and the chunk, then commits the chunk to the history, which codes what has left the window. With any other
attention `update` commits at once and returns dense copies.
"""

from __future__ import annotations

import copy
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from kvcompress import backends
from kvcompress.attention import NAME, KVHandle, OutputMetric, as_mask
from kvcompress.basis import Basis
from kvcompress.codecs import Geometry
from kvcompress.history import History
from kvcompress.memory import MemoryReport, storage_bytes
from kvcompress.reference import Scores
from kvcompress.store import PAGE

if TYPE_CHECKING:
    from kvcompress.shared import Shared

logger = logging.getLogger(__name__)


class Transaction:
    """A forward pass through the layers: what each held before it, so that an error can undo the whole pass.

    Pages never change, so a snapshot is references, the former recent tokens, and what stock sliding layers held.
    """

    def __init__(self) -> None:
        self._before: dict[int, tuple[Any, dict[str, Any]]] = {}

    def enter(self, index: int, layer: Any) -> None:
        """Remember a layer; one that was entered already, or that precedes one that was, begins a new pass.

        The layer before it has been attended by now: if not by our attention, its chunk is still to be settled.
        """
        if self._before:
            latest, _ = self._before[max(self._before)]
            if isinstance(latest, CompressedLayer):
                latest.settle()
            if index <= max(self._before):
                self._before = {}
        state = dict(vars(layer))
        if isinstance(layer, CompressedLayer):
            state["history"] = copy.copy(layer.history)
        self._before[index] = (layer, state)

    def close(self) -> None:
        """From here on the pass cannot be undone."""
        self._before = {}

    def undo(self) -> None:
        """Put every layer back as it was before the pass."""
        for layer, state in self._before.values():
            vars(layer).clear()
            vars(layer).update(state)
        self._before = {}


class CompressedLayer(CacheLayerMixin):
    """One layer's history behind transformers' layer contract."""

    is_compileable = False
    is_sliding = False
    is_croppable = True

    def __init__(self, shared: Shared, index: int, basis: Basis | None):
        super().__init__()
        self.shared, self.index, self.basis = shared, index, basis
        self.config, self.spec, self.layer_count = shared.config, shared.spec, shared.layers
        self.codecs = self.spec.layer(index, self.layer_count)
        self.counts, self.transaction = shared.counts, shared.transaction
        shared.first = index if shared.first is None else shared.first
        self.history: History | None = None
        self.pending: tuple[Tensor, Tensor] | None = None
        self.record_past = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Build the codecs for these head sizes; raises ValueError where one does not support its size."""
        geometry = [Geometry(x.shape[3], side, x.shape[1]) for side, x in enumerate((key_states, value_states))]
        key, value = self.codecs.key.build(geometry[0]), self.codecs.value.build(geometry[1])
        self.history = History(
            key,
            value,
            self.spec.sinks,
            self.spec.window,
            shared=self.spec.basis == "shared",
            preset=None if self.basis is None else self.basis.to(key_states.device),
            encode=partial(backends.encode, self.counts),
            rotation=None if key.frame == "fixed" else self.shared.rotation(self.index, key.head_dim),
            group=self.shared.group,
            pool=partial(self.shared.pool, key_states.device),
        )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def adopt(self, other: CompressedLayer) -> None:
        """Make this layer, which holds nothing yet, go on from what another holds, of which nothing is copied."""
        other.settle()
        self.record_past = other.record_past
        if other.history is not None:
            self.history = other.history.fork(partial(backends.encode, self.counts))
            self.dtype, self.device, self.is_initialized = other.dtype, other.device, True

    def keep_pages(self) -> None:
        """Let pages lie from here on where those of a new layer would."""
        self.settle()
        if self.history is not None:
            self.history.new_pool = partial(self.shared.pool, self.device)
            self.history.pool = self.shared.pool(self.device, self.history.pool)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take a chunk [B, H, Q, D]; returns handles where our attention will read them, else dense copies.

        Raises ValueError, leaving the layer as it was, where ranks that share the context were given different things,
        for shapes that do not go with what is held and for numbers that are not finite (looked for on a CPU and in
        chunks; a single bad token on a GPU makes the output NaN, as it would uncompressed).
        """
        self.settle()
        self.shared.agree(self, key_states)
        self._check(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.device != key_states.device:  # of a cache that was loaded, for a model that lies on several devices
            self.device = key_states.device
            self.prefetch()
        self.pending = key_states, value_states
        if self.config._attn_implementation == NAME:
            shapes = [(*x.shape[:2], self.get_seq_length(), x.shape[3]) for x in (key_states, value_states)]
            key, value = (KVHandle(self, i, s, key_states) for i, s in enumerate(shapes))
            return key, value
        self.settle()
        return self.materialise(0), self.materialise(1)

    def attend(self, query: Tensor, mask: Tensor | None, scores: Scores, output_metric: OutputMetric) -> Tensor:
        """Attention over the history and the pending chunk, which then joins the history: [B, Q, H*G, D_v]."""
        try:
            out = self._attend(query, mask, scores, output_metric)
        except Exception:
            self.undo()
            raise
        if self.index == self.layer_count - 1:
            self.transaction.close()
        return out

    def undo(self) -> None:
        """Undo the forward pass that is under way, in all layers."""
        self.transaction.undo()

    def _attend(self, query: Tensor, mask: Tensor | None, scores: Scores, output_metric: OutputMetric) -> Tensor:
        if mask is not None and mask.shape[-1] != self.get_seq_length():
            raise ValueError(f"the mask covers {mask.shape[-1]} tokens, the cache holds {self.get_seq_length()}")
        if self.pending is None:  # a layer that shares the keys and values of an earlier one (Gemma 3n)
            dense = self.materialise(0), self.materialise(1)
            return backends.attend(query, None, *dense, as_mask(mask, causal=True), scores, self.counts)
        assert self.history is not None
        key, value = self.pending
        out = backends.attend(query, self.history, key, value, as_mask(mask, causal=True), scores, self.counts)
        self.counts["fused"] += 1
        self.settle(self._real_tokens(mask), query, output_metric)
        return out

    def materialise(self, side: int) -> Tensor:
        """All tokens of keys (0) or values (1), [B, H, columns, D], decoded: as large as an uncompressed layer's."""
        assert self.history is not None
        self.counts["materialised"] += 1
        if self.counts["materialised"] == 1:
            logger.warning(
                "a layer's keys or values are being decoded as a whole: the attention is %r, or the model does more "
                "with them than attend; %r attention reads codes (cache.stats() counts)",
                self.config._attn_implementation,
                NAME,
            )
        dense = self.history.dense(side) if self.history.lengths else None
        if self.pending is None:
            assert dense is not None
            return dense
        return self.pending[side] if dense is None else torch.cat([dense, self.pending[side]], dim=2)

    def settle(
        self,
        real: list[int] | None = None,
        query: Tensor | None = None,
        output_metric: OutputMetric = lambda heads, width: None,
    ) -> None:
        """Let the pending chunk join the history.

        real: how many of its tokens, from the end, are no padding. query, output_metric: where our attention ran, what
        tells codecs which errors matter.
        """
        if self.history is None or self.pending is None:
            return
        key, value = self.pending
        self.history.append(key.detach(), value.detach(), real or [key.shape[2]] * len(key), query)
        self.pending = None
        heads, width = value.shape[1], value.shape[3]
        self.history.code(PAGE if self.record_past else 0, lambda: output_metric(heads, width))

    def _real_tokens(self, mask: Tensor | None) -> list[int] | None:
        """The chunk's tokens from each row's first that anybody may attend: only a row's first ones can be padding."""
        assert self.history is not None
        assert self.pending is not None
        rows, _, length, _ = self.pending[0].shape
        lengths = self.history.lengths or [0] * rows
        if mask is None or min(lengths) > 0:
            return None
        if mask.ndim == 4:
            seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            mask = seen.flatten(1, 2).any(dim=1).expand(rows, -1)
        leading = (mask[:, -length:].cumsum(dim=1) == 0).sum(dim=1).tolist()
        return [length if held else length - pad for held, pad in zip(lengths, leading, strict=True)]

    def _check(self, key: Tensor, value: Tensor) -> None:
        if key.shape[:3] != value.shape[:3]:
            raise ValueError(f"keys {tuple(key.shape)} and values {tuple(value.shape)} are not of the same tokens")
        if self.history is not None and self.history.lengths:
            for side, (held, new) in enumerate(zip(self.history.recent, (key, value), strict=True)):
                wanted = (len(self.history.lengths), held.shape[1], new.shape[2], held.shape[3])
                if new.shape != wanted or new.dtype != held.dtype:
                    raise ValueError(
                        f"layer {self.index} holds {('keys', 'values')[side]} of (rows, heads, head_dim) "
                        f"{(wanted[0], wanted[1], wanted[3])} in {held.dtype}, got {tuple(new.shape)} in {new.dtype}; "
                        "a cache belongs to one model and one batch"
                    )
        self._check_finite(key, value)

    def _check_finite(self, *tensors: Tensor) -> None:
        for name, x in zip(("keys", "values"), tensors, strict=True):
            if (x.device.type == "cpu" or x.shape[2] > 1) and not bool(torch.isfinite(x).all()):
                raise ValueError(f"the {name} of layer {self.index} hold NaN or infinite numbers")

    def get_seq_length(self) -> int:
        held = self.history.columns if self.history is not None else 0
        return held + (self.pending[0].shape[2] if self.pending is not None else 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        """Rows held; -1 before there are any."""
        return len(self.history.lengths) if self.history is not None and self.history.lengths else -1

    def activate_past_recording(self) -> None:
        """From now on PAGE tokens more stay exact until `crop`, so that what it takes back was not coded before."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last -tokens_to_remove tokens; raises ValueError for a positive number or more than are held."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        self.settle()
        if self.history is not None:
            self.history.crop(-tokens_to_remove)
            self.history.code(fitted_only=True)  # a fit waits for the attention, which knows the metric of values

    def reset(self) -> None:
        self.pending, self.history, self.is_initialized = None, None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.settle()
        if self.history is not None:
            self.history.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.settle()
        if self.history is not None:
            self.history.select(torch.arange(len(self.history.lengths)).repeat_interleave(repeats))

    def offload(self) -> None:
        self.settle()
        if self.history is not None:
            self.history.to("cpu")

    def prefetch(self) -> None:
        if self.history is not None:
            self.history.to(self.device)

    def memory(self) -> MemoryReport:
        """Bytes of this layer by part, summed over real storage."""
        history, pending = self.history, self.pending or ()
        if history is None or not (history.lengths or pending):
            return MemoryReport.nothing()
        held = history.recent or pending
        width = held[0].shape[1] * (held[0].shape[3] + held[1].shape[3])
        rows = len(held[0])
        pages = history.pool.stored_bytes()
        codes = sum(size for name, size in pages.items() if name.endswith(".codes"))
        fits = [item for fit in history.fits for item in fit.items()]
        derived = () if history.derived is None else history.derived.tensors
        fresh = rows * pending[0].shape[2] if pending else 0
        elsewhere = (sum(history.coded) - sum(history.stored)) * width  # elements that other ranks keep
        return MemoryReport(
            codes=codes,
            scales=sum(pages.values()) - codes,
            means=storage_bytes(x for name, x in fits if name.split(".")[-1] == "mean"),
            bases=storage_bytes([*(x for name, x in fits if name.split(".")[-1] != "mean"), *derived]),
            tables=storage_bytes(history.tables()),
            exact=storage_bytes([*history.sink, *history.recent, *history.queries, *pending]),
            tokens=max(history.lengths, default=0) + (pending[0].shape[2] if pending else 0),
            coded_elements=sum(history.stored) * width,
            elements=(sum(history.lengths) + fresh) * width - elsewhere,
            uncompressed=(rows * self.get_seq_length() * width - elsewhere) * self.dtype.itemsize,
            **history.pool.away(),
        )


class CompressedHybridLayer(LinearAttentionLayer, CompressedLayer):  # type: ignore[misc, override]  # bases disagree
    """A layer with attention and linear attention in parallel (Falcon-H1): codes beside transformers' own states."""

    is_compileable = False

    def __init__(self, number_of_states: int, *args: Any):
        CompressedLayer.__init__(self, *args)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        (CompressedLayer if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)

    def _each(self, name: str, *args: Any) -> None:
        getattr(LinearAttentionLayer, name)(self, *args)
        getattr(CompressedLayer, name)(self, *args)

    def offload(self) -> None:
        self._each("offload")

    def prefetch(self) -> None:
        self._each("prefetch")

    def reset(self) -> None:
        self._each("reset")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each("reorder_cache", beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        self._each("crop", tokens_to_remove)
