"""A whole model's decode step on fixed tensors: `StaticModel` takes a `CompressedCache` over after the prefill.

    static = StaticModel(model, cache, capacity=32_768)
    logits = static.step(token_ids)                          # [B, 1] to [B, 1, vocabulary]
    static.close()                                           # the cache goes on as usual

Token ids, positions, exact tokens, page tables and their counts lie on the device, so from the second step on a GPU
replays a CUDA graph; elsewhere steps run one by one. Pages close when they would in ordinary decoding, between steps.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.attention import NAME
from kvcompress.cache import CompressedCache
from kvcompress.graph import Replayed
from kvcompress.history import History
from kvcompress.layer import CompressedLayer
from kvcompress.memory import MemoryReport
from kvcompress.static import StaticDecode, StaticRefusalError, refusal, waiting
from kvcompress.static_cache import StaticCache

#: Rotary embeddings whose frequencies the host chooses by the longest position.
LENGTH_DEPENDENT = frozenset({"dynamic", "longrope"})


class StaticModel:
    """See the module. `cache` stays what it is to everybody else: asked for anything, it takes in the steps since.

    What changes the cache in another way (a forward pass with it, `crop`, `reset`, choosing rows) ends static decoding.
    Left padding is taken, since a cache does not store it; other masks are not.

    capacity: real tokens that a row may come to have, those held counted; room for them is made at once. position_ids:
    of the next token, int64 [..., B or 1, 1] as the model takes them (None: those after each row's real tokens).

    Raises ValueError for a capacity below what is held, and StaticRefusalError, which is one, for a model or a cache
    that cannot decode statically: `refuses` and `waits` tell why.
    """

    def __init__(
        self, model: PreTrainedModel, cache: CompressedCache, capacity: int, position_ids: Tensor | None = None
    ):
        cache.lend(None)
        reason = refuses(model, cache) or waits(cache)
        if reason is not None:
            raise StaticRefusalError(reason)
        histories = [layer.history for layer in compressed_layers(cache) if layer.history is not None]
        self.model, self.cache = model, cache
        self._decodes = [StaticDecode(history, capacity, _groups(model, history)) for history in histories]
        self._static = StaticCache(self._decodes)
        device, lengths = histories[0].recent[0].device, histories[0].lengths
        with torch.inference_mode(False):  # so that they can be written to in that mode and outside
            self._tokens = torch.zeros(len(lengths), 1, dtype=torch.int64, device=device)
            after = torch.tensor(lengths, device=device).unsqueeze(1)
            self._positions = after if position_ids is None else position_ids.to(device, copy=True)
        self._replayed = Replayed(self._forward, device, cache.refuse_static)
        self._taken = 0  # steps since the layers were told of any
        self._plan()
        cache.lend(self)

    def step(self, token_ids: Tensor) -> Tensor:
        """The logits [B, 1, vocabulary] after one token more in every row: token_ids int64 [B, 1].

        Raises ValueError for another shape, beyond the capacity and once closed; on an error the step is undone.
        """
        if self.cache.borrower is not self:
            raise ValueError("static decoding has ended: close() was called, or its cache was changed")
        if token_ids.shape != self._tokens.shape:
            raise ValueError(f"a step takes token ids {tuple(self._tokens.shape)}, got {tuple(token_ids.shape)}")
        if self._taken >= min(self._due, self._room):
            self.settle()
        if not self._room:
            raise StaticRefusalError(f"the capacity of {self._decodes[0].capacity} tokens is reached")
        with torch.no_grad():
            self._tokens.copy_(token_ids)
            logits = self._replayed().clone()
        self._taken += 1
        self.cache.count_step()
        return logits

    @property
    def graphed(self) -> bool:
        """Whether steps are replays of a CUDA graph."""
        return self._replayed.captured

    def undo(self, steps: int) -> None:
        """Take the last steps back; raises ValueError for more than have been taken since the last `settle`."""
        if not 0 <= steps <= self._taken:
            raise ValueError(f"0 to {self._taken} steps can be undone since the cache was settled, got {steps}")
        self._taken -= steps
        self._positions.sub_(steps)
        for decode in self._decodes:
            decode.rewind(self._taken)

    def settle(self) -> None:
        """Let the cache take in all steps, close pages that are due, and give the device what is new."""
        if self._taken:
            for decode in self._decodes:
                decode.settle(self._taken)
            self._taken = 0
            self._plan()

    def close(self) -> None:
        """Settle, and give the cache back. The room for pages stays with it, for pages to come."""
        if self.cache.borrower is self:
            self.cache.lend(None)

    def memory(self) -> MemoryReport:
        """Bytes held beside the cache's own."""
        return sum((decode.memory() for decode in self._decodes), MemoryReport.nothing())

    def _plan(self) -> None:
        """Find out how many steps may follow, and after how many of them a page is due."""
        self._room = min(decode.room for decode in self._decodes)
        self._due = min(decode.due for decode in self._decodes)

    def _forward(self) -> Tensor:
        """The step itself, without a look at the device."""
        try:
            logits: Tensor = self.model(
                input_ids=self._tokens, position_ids=self._positions, past_key_values=self._static, use_cache=True
            ).logits
            self._static.finish_step()
        except BaseException:
            self._static.drop_step()
            if not self._replayed.capturing:
                for decode in self._decodes:
                    decode.rewind(self._taken)
            raise
        self._positions.add_(1)
        return logits


def compressed_layers(cache: CompressedCache) -> list[CompressedLayer]:
    """A cache's layers with codes, the chunks they were given taken in."""
    layers = [layer for layer in cache.layers if isinstance(layer, CompressedLayer)]
    for layer in layers:
        layer.settle()
    return layers


def _groups(model: PreTrainedModel, history: History) -> int:
    heads: int = model.config.get_text_config(decoder=True).num_attention_heads
    return heads // history.recent[0].shape[1]


def waits(cache: CompressedCache) -> str | None:
    """Why a cache does not decode statically yet; None once every layer has a page of every fitted row."""
    for layer in compressed_layers(cache):
        if layer.history is None:
            return "static decoding starts after the prefill, got a cache without tokens"
        reason = waiting(layer.history)
        if reason is not None:
            return reason
    return None


def refuses(model: PreTrainedModel, cache: CompressedCache) -> str | None:
    """What of a model or of a cache static decoding does not take; None where it takes all that can be told so far."""
    config = model.config.get_text_config(decoder=True)
    kinds = sorted({type(layer).__name__ for layer in cache.layers if type(layer) is not CompressedLayer})
    if kinds:
        return f"layers of other kinds than full attention: {', '.join(kinds)}"
    if cache.group is not None:
        return f"a context that {cache.group.world} ranks hold together"
    if cache.page_offload is not None:
        return "a cache whose pages are offloaded"
    if config._attn_implementation != NAME:
        return f"{config._attn_implementation!r} attention, which decodes whole layers; it takes {NAME!r}"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "a model that takes no position_ids"
    if LENGTH_DEPENDENT & _rope_types(getattr(config, "rope_parameters", None)):
        return "a rotary position embedding that depends on the length"
    if not isinstance(getattr(config, "num_attention_heads", None), int):
        return "a config that names no number of attention heads"
    layers = compressed_layers(cache)
    if any(layer.record_past for layer in layers):
        return "a cache that tokens are taken back from (speculative decoding)"
    histories = [layer.history for layer in layers if layer.history is not None and layer.history.lengths]
    if len({history.recent[0].device for history in histories}) > 1 or len({x.device for x in model.parameters()}) > 1:
        return "a model on several devices"
    ready = [history for history in histories if waiting(history) is None]
    return next((reason for history in ready if (reason := refusal(history, _groups(model, history)))), None)


def _rope_types(parameters: object) -> set[str]:
    """The kinds named in a config's rope_parameters, which may be nested by kind of layer."""
    if not isinstance(parameters, dict):
        return set()
    own = {parameters["rope_type"]} if isinstance(parameters.get("rope_type"), str) else set()
    return own.union(*(_rope_types(inner) for inner in parameters.values()))
