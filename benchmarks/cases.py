"""What a cache is measured on: a subject at one context and seed, with the uncompressed model's answers known."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from benchmarks.caches import UNCOMPRESSED, Contender
from benchmarks.greedy import agreed, trajectory
from benchmarks.passages import Passage
from benchmarks.quality import compare, predict
from benchmarks.results import failed, first_line
from benchmarks.rows import Row
from benchmarks.storage import Footprint, footprint


class Case(Protocol):
    """One subject at one context and seed."""

    def probe(self, contender: Contender) -> None:
        """Give the cache one token; raises ValueError where it does not support what it is given."""

    def measure(self, contender: Contender, row: Row) -> Row:
        """The row with all that could be measured; raises whatever the cache raises."""


def filled(case: Case, contender: Contender, row: Row) -> Row:
    """The row of a cache on a case, whatever happens: measured, or with a status and a reason."""
    begun = time.perf_counter()
    try:
        case.probe(contender)
    except ValueError as error:
        return replace(row, status="not supported", reason=first_line(error))
    except Exception as error:  # a cache that breaks is a result to show
        return failed(row, error)
    try:
        return replace(case.measure(contender, row), seconds=time.perf_counter() - begun)
    except Exception as error:
        return failed(row, error)


@dataclass(frozen=True)
class Reading:
    """A document read through a cache.

    log_probs: [n, vocabulary] at the scored positions. chosen: the ids [a] that were first choice where the answers
    stand. path: the greedy continuation of the document. size: what the cache took before that.
    """

    log_probs: Tensor
    chosen: Tensor
    path: list[int]
    size: Footprint


class ModelCase:
    """A model and the documents of one seed, read through the uncompressed cache when the case is made.

    chunk: tokens fed at a time. greedy: tokens of the greedy continuation of every document.
    """

    def __init__(self, model: PreTrainedModel, passages: Sequence[Passage], chunk: int, greedy: int):
        self.model, self.passages, self.chunk, self.greedy = model, passages, chunk, greedy
        vocabulary = model.config.get_text_config().vocab_size
        self.scored = [passage.scored(vocabulary) for passage in passages]
        self.answers = [_before(passage.needle + passage.keys) for passage in passages]
        self.caches: list[Cache] = []  # uncompressed ones, which sizes are compared with
        self.reference = [self._read(UNCOMPRESSED, index) for index in range(len(passages))]

    @torch.inference_mode()
    def probe(self, contender: Contender) -> None:
        """See `Case`."""
        cache = contender.make(self.model.config)
        with contender.attending(self.model):
            self.model(self.passages[0].ids[:, :1].to(self.model.device), past_key_values=cache, use_cache=True)

    def measure(self, contender: Contender, row: Row) -> Row:
        """See `Case`. Sizes are those of the last document's cache."""
        known = contender is UNCOMPRESSED
        found = self.reference if known else [self._read(contender, index) for index in range(len(self.passages))]
        targets = [passage.ids[0, at + 1] for passage, at in zip(self.passages, self.scored, strict=True)]
        score = compare([each.log_probs for each in self.reference], [each.log_probs for each in found], targets)
        needle, keys = self._recall(found)
        pairs = zip(found, self.reference, strict=True)
        size = found[-1].size
        return replace(
            row,
            **size.fields(),
            **score.fields(),
            needle_recall=_share(needle),
            needle_questions=len(needle),
            key_recall=_share(keys),
            key_questions=len(keys),
            greedy_tokens=_share([agreed(a.path, b.path) for a, b in pairs]) if self.greedy else None,
        )

    def _read(self, contender: Contender, index: int) -> Reading:
        """One pass of a document through a fresh cache, then the greedy continuation."""
        ids, scored, answers = self.passages[index].ids, self.scored[index], self.answers[index]
        last = torch.tensor([ids.shape[1] - 1])
        positions = torch.cat([scored, answers, last]).unique()
        said = predict(self.model, contender, ids, positions, self.chunk, lambda tokens: None)
        at = {name: torch.searchsorted(positions, p) for name, p in (("scored", scored), ("answers", answers))}
        if contender is UNCOMPRESSED:
            self.caches.append(copy.deepcopy(said.cache))
        size = footprint(said.cache, self.caches[index])
        expected = None if contender is UNCOMPRESSED else self.reference[index].path
        first = int(said.log_probs[-1].argmax())
        path = trajectory(self.model, contender, said.cache, first, self.greedy, expected)
        return Reading(said.log_probs[at["scored"]], said.log_probs[at["answers"]].argmax(dim=-1).cpu(), path, size)

    def _recall(self, found: Sequence[Reading]) -> tuple[list[bool], list[bool]]:
        """For every question of a single needle, and of many keys, whether it was answered word for word."""
        needle: list[bool] = []
        keys: list[bool] = []
        for passage, answers, reading in zip(self.passages, self.answers, found, strict=True):
            same = reading.chosen == passage.ids[0, answers + 1]
            ranges = passage.needle + passage.keys
            right = [bool(part.all()) for part in same.split([len(each) for each in ranges])] if ranges else []
            needle += right[: len(passage.needle)]
            keys += right[len(passage.needle) :]
        return needle, keys


def _before(ranges: Sequence[range]) -> Tensor:
    """The positions that predict the tokens at `ranges`, int64."""
    return torch.tensor([place - 1 for each in ranges for place in each], dtype=torch.int64)


def _share(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
