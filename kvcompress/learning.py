"""What a prefill of passages of text teaches: the parts of a model's cache, bases for a file, ranks by energy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.basis import Basis
from kvcompress.budget import Part, to_spec
from kvcompress.cache import CompressedCache, CompressedLayer
from kvcompress.codecs import Codec, Fit
from kvcompress.codecs.lowrank import rank_for_energy
from kvcompress.divergence import CHUNK, Text, attending
from kvcompress.history import History
from kvcompress.spec import CacheSpec, CodecSpec
from kvcompress.store import PAGE

ROWS = 16  # passages to learn from, where the text has so many
PROBE = 8  # tokens that show what the layers hold
LEAST_RANK = 8
RANKED = re.compile(r"\b(lowrank|jointrank)(?=\s*(?:\+|$))")  # where the rank goes


def find_parts(model: PreTrainedModel, heads: bool = False) -> list[Part]:
    """What a cache codes: keys and values of every full-attention layer, or those of every KV head."""
    parts = []
    for index, history in _probe(model, CacheSpec.parse("exact")).items():
        for side, held in enumerate(history.recent):
            count, width = held.shape[1], held.shape[3]
            whole = [Part(index, side, None, count * width)]
            parts += [Part(index, side, head, width) for head in range(count)] if heads else whole
    return parts


def coded_from(model: PreTrainedModel, spec: CacheSpec) -> int:
    """Tokens of a text fed in chunks of CHUNK after which a cache holds codes."""
    fit_tokens = max(history.fit_tokens for history in _probe(model, spec).values())
    return -(-(spec.sinks + max(fit_tokens, spec.window + PAGE)) // CHUNK) * CHUNK


def learn_basis(model: PreTrainedModel, text: Text, spec: CacheSpec, seed: int = 0) -> dict[int, Basis]:
    """What the codecs of a spec learn from ROWS passages together, by layer, for `basis.save`.

    Raises ValueError for a text that is too short for one passage.
    """
    *_, cache = _prefilled(model, text, spec, seed)
    found = {}
    for index, history in _histories(cache).items():
        layer = spec.layer(index, len(cache.layers))
        key, value = ({name: x.clone() for name, x in fit.items()} for fit in history.fits)
        found[index] = Basis((str(layer.key), str(layer.value)), (key, value))
    return found


def ranks_by_energy(model: PreTrainedModel, text: Text, codec: str, energy: float, seed: int = 0) -> dict[Part, int]:
    """The ranks that keep a share of the energy of every layer's keys and values, weighted as the codec weighs errors.

    codec: one without its rank (lowrank, prerope+lowrank, lowrank+trellis, jointrank). Raises ValueError for another
    codec, an energy that is no share, or a text that is too short.
    """
    joint = _family(codec) == "jointrank"
    least = ranked(codec, LEAST_RANK)
    prefill = _prefilled(model, text, CacheSpec(least, least), seed)
    witnesses = {}
    for index, history in _histories(next(prefill)).items():
        witnesses[index] = tuple(_Witness(own) for own in history.codecs)
        history.codecs = witnesses[index]  # type: ignore[assignment]  # they pass for codecs
    next(prefill)
    ranks = {}
    for part in find_parts(model):
        x, metric = witnesses[part.layer][part.side].seen
        ranks[part] = rank_for_energy(x, metric, energy, joint)
    return ranks


def ranked(codec: str, rank: int) -> CodecSpec:
    """The codec with its rank; raises ValueError where it has none."""
    _family(codec)
    return CodecSpec.parse(RANKED.sub(rf"\g<1>{rank}", codec))


def with_ranks(codec: str, ranks: Mapping[Part, int]) -> CacheSpec:
    """The spec with these ranks."""
    return to_spec({part: ranked(codec, rank) for part, rank in ranks.items()}, CacheSpec())


def _family(codec: str) -> str:
    found = RANKED.search(codec)
    if found is None:
        raise ValueError(
            f"energy chooses ranks, which {codec!r} has none of to choose: give lowrank, prerope+lowrank, jointrank or "
            "one with a codec behind, such as lowrank+trellis4"
        )
    return found[1]


class _Witness:
    """A codec that keeps what it was fitted to: vectors [1, H, tokens, D] and their metric."""

    def __init__(self, codec: Codec):
        self._codec = codec
        self.seen: tuple[Tensor, Tensor | None]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codec, name)

    def fit(self, x: Tensor, metric: Tensor | None = None) -> Fit:
        self.seen = x, metric
        return self._codec.fit(x, metric)


def _prefilled(model: PreTrainedModel, text: Text, spec: CacheSpec, seed: int) -> Iterator[CompressedCache]:
    """A cache that all rows share what is learned in: as they begin, and when it has been learned.

    The window is such that no more than a page of each row is coded, since codes are not what is wanted.
    """
    fit_tokens = max(history.fit_tokens for history in _probe(model, replace(spec, basis="prompt")).values())
    length = spec.sinks + max(fit_tokens, PAGE)
    rows = torch.cat(text.passages(min(ROWS, max(text.room(length), 1)), length, seed))
    cache = CompressedCache(model.config, replace(spec, window=max(fit_tokens - PAGE, 0), basis="shared"))
    _feed(model, cache, rows[:, :PROBE])
    yield cache
    _feed(model, cache, rows[:, PROBE:])
    yield cache


def _probe(model: PreTrainedModel, spec: CacheSpec) -> dict[int, History]:
    """What the layers hold after a few tokens."""
    cache = CompressedCache(model.config, spec)
    _feed(model, cache, torch.zeros(1, PROBE, dtype=torch.int64))
    return _histories(cache)


def _histories(cache: CompressedCache) -> dict[int, History]:
    layers = {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, CompressedLayer)}
    return {index: layer.history for index, layer in layers.items() if layer.history is not None}


@torch.inference_mode()
def _feed(model: PreTrainedModel, cache: CompressedCache, ids: Tensor) -> None:
    """Prefill ids [B, N] in chunks."""
    with attending(model):
        for chunk in ids.split(CHUNK, dim=1):
            model(chunk.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
