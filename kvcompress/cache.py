"""`CompressedCache`: a transformers cache whose full-attention layers hold codes (see `kvcompress.layer`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer

from kvcompress import basis as bases
from kvcompress import persist
from kvcompress.basis import Basis
from kvcompress.layer import CompressedHybridLayer, CompressedLayer
from kvcompress.memory import MemoryReport, storage_bytes
from kvcompress.parallel import ContextGroup, Group
from kvcompress.shared import Shared
from kvcompress.spec import DEFAULT_SPEC, CacheSpec, LayerSpec
from kvcompress.state import share
from kvcompress.tiers import Offload

if TYPE_CHECKING:
    from typing_extensions import Self


logger = logging.getLogger(__name__)
_said: set[str] = set()  # reasons


class Borrower(Protocol):
    """What decodes with a cache's histories in its own way (kvcompress/static_model.py)."""

    def settle(self) -> None:
        """Let the histories take in all tokens."""

    def memory(self) -> MemoryReport:
        """Bytes held beside the histories."""


class CompressedCache(Cache):
    """A cache for `model.generate(..., past_key_values=CompressedCache(model.config, "trellis3"))`.

    config: the model's (its text part is taken); the same object, since it names the attention in use. spec: a
    CacheSpec or its string. Full-attention layers hold codes; sliding, linear and dummy layers stay as transformers
    makes them. Raises ValueError where the model has no full-attention layer, the spec names a layer beyond its layers,
    or (at the first token, before anything is stored) a codec does not support its head sizes.

    group: a ProcessGroup, or one dimension of a DeviceMesh, whose ranks hold the context together: each of them runs
    the model on the same tokens with a cache like this one, and keeps its share of the pages (`kvcompress.parallel`).
    What one rank does with its cache all have to do.

    offload: budgets for pages, of which those beyond the device's wait in the host's memory or in a file until they are
    attended (`kvcompress.Offload`); caches that are given the same one share its budgets. What this cache attends is
    the same as without.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        spec: CacheSpec | str = DEFAULT_SPEC,
        group: Group | None = None,
        offload: Offload | None = None,
    ):
        spec = CacheSpec.parse(spec)
        known = bases.load(spec.basis) if spec.basis not in ("prompt", "shared") else {}
        self._build(config.get_text_config(decoder=True), spec, known, ContextGroup.of(group), offload)

    def _build(
        self,
        config: PreTrainedConfig,
        spec: CacheSpec,
        known: dict[int, Basis],
        group: ContextGroup | None = None,
        offload: Offload | None = None,
    ) -> None:
        """Make the layers. known: what was learned before, by layer."""
        self.spec, self._config, self.group = spec, config, group
        self.borrower: Borrower | None = None
        layers: list[Any] = list(DynamicCache(config=config).layers)
        layers = layers or [DynamicLayer() for _ in range(config.num_hidden_layers)]
        shared = self._shared = Shared(config, spec, len(layers), group, offload)
        self._counts, self._transaction = shared.counts, shared.transaction
        for index, layer in enumerate(layers):
            settings = (shared, index, known.get(index))
            if type(layer) is DynamicLayer:
                layers[index] = CompressedLayer(*settings)
            elif type(layer) is LinearAttentionAndFullAttentionLayer:
                layers[index] = CompressedHybridLayer(layer.number_of_states, *settings)
            if isinstance(layers[index], CompressedLayer):
                self._check_basis(index, layers[index].codecs, known)
        if not any(isinstance(layer, CompressedLayer) for layer in layers):
            kinds = ", ".join(sorted({type(layer).__name__ for layer in layers}))
            raise ValueError(f"{type(config).__name__} has no full-attention layer to compress (its layers: {kinds})")
        super().__init__(layers=layers)

    def _check_basis(self, index: int, codecs: LayerSpec, known: dict[int, Basis]) -> None:
        """Raises ValueError where the spec names a basis file that does not go with it."""
        if known and index not in known:
            raise ValueError(f"{self.spec.basis!r} holds no basis for layer {index}, only for {sorted(known)}")
        if known:
            known[index].check(index, (str(codecs.key), str(codecs.value)))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `CompressedLayer.update`. On an error every attention layer is as it was before this forward pass."""
        if self.borrower is not None:
            self.lend(None)
        if layer_idx >= len(self.layers):
            self._transaction.undo()
            raise ValueError(f"this cache was made for {len(self.layers)} layers, got layer {layer_idx}")
        layer: Any = self.layers[layer_idx]
        self._transaction.enter(layer_idx, layer)
        try:
            result: tuple[Tensor, Tensor] = layer.update(key_states, value_states, *args, **kwargs)
        except Exception:
            self._transaction.undo()
            raise
        if layer_idx == len(self.layers) - 1 and not isinstance(layer, CompressedLayer):
            self._transaction.close()
        return result

    def lend(self, borrower: Borrower | None) -> None:
        """Let `borrower` decode from here on, until the cache is changed otherwise; None: end that."""
        self._settle()
        self._transaction.close()
        self.borrower = borrower

    def _settle(self) -> None:
        if self.borrower is not None:
            self.borrower.settle()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of every row, padding included."""
        self._settle()
        return int(super().get_seq_length(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(tokens that a mask for `query_length` more covers, the first of them)."""
        self._settle()
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    def rollback(self) -> None:
        """Undo a forward pass that an error outside the cache broke off.

        Attention layers are as they were before it; linear-attention states, which change in place, are not.
        """
        self._transaction.undo()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last -tokens_to_remove tokens; raises ValueError, changing nothing, for more than are held."""
        held = self.get_seq_length()
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        if -tokens_to_remove > held:
            raise ValueError(f"cannot remove {-tokens_to_remove} tokens from a cache of {held}")
        self._all_or_none(super().crop, tokens_to_remove)

    def reset(self) -> None:
        """Forget all tokens."""
        self._all_or_none(super().reset)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Make row i what row beam_idx[i] was; pages are shared, not copied."""
        self._all_or_none(super().reorder_cache, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times; pages are shared, not copied."""
        self._all_or_none(super().batch_repeat_interleave, repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (or bool); pages are shared, not copied."""
        self._all_or_none(super().batch_select_indices, indices)

    def _all_or_none(self, change: Callable[..., None], *args: Any) -> None:
        """Change every layer, or, where one of them raises, none."""
        self.lend(None)
        for index, layer in enumerate(self.layers):
            self._transaction.enter(index, layer)
        try:
            change(*args)
        except Exception:
            self._transaction.undo()
            raise
        self._transaction.close()

    def save(
        self,
        path: str | Path,
        notes: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write all that is held to a safetensors file of about `memory()`'s bytes, which `load` reads.

        Pages are written once however many rows share them; those that no row names are left out. A failure leaves no
        file, and an older one as it was. Takes about as much memory on the host as the file is large, one layer more
        on the device. notes (JSON), tensors: what else the file is to hold, for `kvcompress.persist.read_notes`.

        Raises ValueError, writing nothing, in the middle of a forward pass, where transformers holds a
        layer in a way that is not known and where other ranks keep some of the pages; OSError or SafetensorError where
        the file cannot be written.
        """
        if self.group is not None:
            raise ValueError(
                f"a cache whose pages are dealt out to {self.group.world} ranks cannot be saved; one without group= can"
            )
        self._settle()
        persist.save(path, self._config, self.spec, self.layers, notes, tensors)

    @classmethod
    def load(
        cls,
        path: str | Path,
        config: PreTrainedConfig,
        device: torch.device | str | None = None,
        *,
        mapped: bool = False,
        verify: bool = True,
        offload: Offload | None = None,
    ) -> Self:
        """A cache that goes on where the one that was saved had stopped.

        config: the model's, as for a new cache. device: where all layers go (None: torch's default device, usually the
        CPU). mapped: leave pages in the file, on the CPU, where the system reads them when they are attended and may
        drop them again; the file must not be written to meanwhile (a new one may be moved to its place). verify:
        compare the checksum of all that the file holds, and look for numbers that are not finite; both read the pages.
        offload: as for a new cache; pages go where it has room for them one after another.

        Raises FileNotFoundError where there is no such file, ValueError where it is damaged, no saved cache, of another
        version, contradicts itself, or is of a model whose geometry, dtype or RoPE is not the config's; weights are not
        compared (`kvcompress.fingerprint` tells them apart).
        """
        config = config.get_text_config(decoder=True)
        if mapped and offload is not None:
            raise ValueError(
                "pages stay in the file that was saved (mapped) or go where an offload puts them: give one"
            )
        spec, states = persist.load(path, config, device, mapped, verify, pages_mapped=offload is not None)
        cache, known = cls.__new__(cls), {i: state.basis for i, state in enumerate(states) if state.basis is not None}
        cache._build(config, spec, known, offload=offload)
        persist.restore(path, cache.layers, states)
        return cache

    def fork(self, config: PreTrainedConfig | None = None) -> Self:
        """A cache that holds the same tokens and goes on by itself; pages and exact tokens are shared, not copied.

        From here on neither writes to pages that the other may name. config: of the model that the fork is for, where
        that is another object than this cache's. Raises ValueError in the middle of a forward pass, where transformers
        holds a layer in a way that is not known, and for a config of other layers.
        """
        self._settle()
        persist.check_finished(self.layers)
        bases_of = {i: x.basis for i, x in enumerate(self.layers) if isinstance(x, CompressedLayer)}
        known = {index: basis for index, basis in bases_of.items() if basis is not None}
        fork, own = type(self).__new__(type(self)), self._config if config is None else config
        fork._build(own.get_text_config(decoder=True), self.spec, known, self.group, self.page_offload)
        if len(fork.layers) != len(self.layers):
            raise ValueError(f"a cache of {len(self.layers)} layers was to be forked for {len(fork.layers)}")
        for layer, source in zip(fork.layers, self.layers, strict=True):
            share(layer, source)
        return fork

    @property
    def page_offload(self) -> Offload | None:
        """What says where pages lie; None: all on the device."""
        return self._shared.offload

    def keep_pages_in(self, offload: Offload) -> None:
        """Let pages lie where `offload` puts them; those of a cache that has one already stay with that one.

        Raises OSError, with the cache as it was, where pages that have to be stored cannot be.
        """
        if self._shared.offload is None:
            self._shared.offload = offload
            try:
                self._all_or_none(self._move_pages)
            except Exception:
                self._shared.offload = None
                raise

    def _move_pages(self) -> None:
        for layer in self.layers:
            if isinstance(layer, CompressedLayer):
                layer.keep_pages()

    def memory(self) -> MemoryReport:
        """Measured bytes of keys and values in all layers; those of stock layers count as exact.

        Linear-attention states, which do not grow, are left out. With a group: of this rank's share, and of what all
        ranks hold.
        """
        self._settle()
        beside = MemoryReport.nothing() if self.borrower is None else self.borrower.memory()
        return sum((_layer_memory(layer) for layer in self.layers), beside)

    def stats(self) -> dict[str, int]:
        """fused: attention calls on codes; materialised: times a layer's keys or values were decoded as a whole.

        static: decode steps on fixed tensors, where there were any. collectives, payload: with a group, its collectives
        so far, and the bytes that this rank handed to them. Then `refused: REASON` for the calls that the
        kernels, where they were due, left to the torch reference, and for decoding that was to be static and was not.
        """
        static = ("static",) if self._counts["static"] else ()
        refusals = sorted(name for name in self._counts if name.startswith("refused: "))
        group = {} if self.group is None else {"collectives": self.group.calls, "payload": self.group.payload}
        counted = ("fused", "materialised", *static)
        return {name: self._counts[name] for name in counted} | group | {name: self._counts[name] for name in refusals}

    def count_step(self) -> None:
        """Count a decode step that a borrower took through all layers."""
        self._counts["fused"] += len(self.layers)
        self._counts["static"] += 1

    def take_counts(self, other: CompressedCache) -> None:
        """Add what another cache counted, whose place this one takes in a call of `generate`."""
        self._counts.update(other._counts)

    def refuse_static(self, reason: str) -> None:
        """Count why decoding is not static, or without a graph, and log the first time that it is for this reason."""
        self._counts[f"refused: static decoding: {reason}"] += 1
        if reason not in _said:
            _said.add(reason)
            logger.warning("static decoding was asked for and is not done: %s", reason)


def _layer_memory(layer: Any) -> MemoryReport:
    """A layer's bytes; those of a stock layer's keys and values count as exact."""
    if isinstance(layer, CompressedLayer):
        return layer.memory()
    held = [x for x in (getattr(layer, "keys", None), getattr(layer, "values", None)) if isinstance(x, Tensor)]
    elements = sum(x.numel() for x in held)
    size = storage_bytes(held)
    return MemoryReport(0, 0, 0, 0, 0, size, layer.get_seq_length() if held else 0, 0, elements, size)
