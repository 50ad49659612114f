"""Needle recall through a cache: facts spread over a long text, all asked for at its end.

A greedy answer is right when every token of it is the model's first choice, which one teacher-forced pass tells for
all questions of a document. A gap of plain text after the last fact keeps every fact out of the exact recent window.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.caches import Contender
from benchmarks.quality import Advance, Predictions, predict
from benchmarks.recall import Fact, draw_facts
from benchmarks.texts import Text, encode


@dataclass(frozen=True)
class Document:
    """ids [1, N], and where in it the answers stand (each a range of positions)."""

    ids: Tensor
    answers: tuple[range, ...]

    @property
    def positions(self) -> Tensor:
        """The positions that predict the answers' tokens, ascending, int64."""
        return torch.tensor([place - 1 for answer in self.answers for place in answer])


class Answerable(Protocol):
    """The text of a question, and the answer that a model goes on with."""

    @property
    def question(self) -> str: ...

    @property
    def answer(self) -> str: ...


@dataclass(frozen=True)
class Asked:
    """A question at the end of a document, its answer, and the text that closes it.

    A list of answers is several of these: the question of a further one is what stands between it and the one before.
    """

    question: str
    answer: str
    end: str = ".\n"


def question_and_answer(tokenizer: PreTrainedTokenizerBase, asked: Answerable) -> tuple[Tensor, Tensor]:
    """Ids of the question and of the answer, split where those of both together first differ from the question's."""
    question, both = encode(tokenizer, asked.question), encode(tokenizer, asked.question + asked.answer)
    same = (both[: len(question)] == question[: len(both)]).long().cumprod(0).sum()
    return both[:same], both[same:]


def build(
    tokenizer: PreTrainedTokenizerBase, filler: Tensor, facts: Sequence[Fact], asked: Sequence[Fact], gap: int
) -> Document:
    """A document as long as `filler` [1, N]: text with `facts` in even steps, `gap` tokens of text, then the questions.

    Raises ValueError where the facts, the gap and the questions leave no room for a text.
    """
    stated = list(zip(even_steps(len(facts)), [fact.statement for fact in facts], strict=True))
    return assemble(tokenizer, filler, stated, [Asked(fact.question, fact.answer) for fact in asked], gap)


def even_steps(count: int) -> list[float]:
    """`count` depths, each in the middle of its step of the text."""
    return [(index + 0.5) / count for index in range(count)]


def assemble(
    tokenizer: PreTrainedTokenizerBase,
    filler: Tensor,
    stated: Sequence[tuple[float, str]],
    asked: Sequence[Asked],
    gap: int,
) -> Document:
    """A document as long as `filler` [1, N], of which it takes the first tokens for its text.

    stated: what stands in it, each at its depth: 0 after the filler's first token (which may be a tokenizer's prefix),
    1 at the end of the text before the gap. After `gap` tokens of text, in which nothing stands, come the questions.
    Raises ValueError where all this leaves no room for a text.
    """
    statements = sorted(((depth, encode(tokenizer, text)) for depth, text in stated), key=lambda pair: pair[0])
    parts_asked = [(*question_and_answer(tokenizer, each), encode(tokenizer, each.end)) for each in asked]
    used = sum(len(ids) for _, ids in statements) + sum(len(ids) for parts in parts_asked for ids in parts)
    room = filler.shape[1] - used - gap
    if room < len(statements) + 1:
        raise ValueError(
            f"{len(statements)} statements, {len(asked)} questions and a gap of {gap} tokens leave no room for text "
            f"in {filler.shape[1]} tokens"
        )
    text, parts, last = filler[0], [filler[0, :1]], 1
    for depth, statement in statements:
        place = 1 + int(depth * (room - 1))
        parts += [text[last:place], statement]
        last = place
    parts.append(text[last : room + gap])
    place, answers = sum(map(len, parts)), []
    for question, answer, end in parts_asked:
        parts += [question, answer, end]
        answers.append(range(place + len(question), place + len(question) + len(answer)))
        place += len(question) + len(answer) + len(end)
    return Document(torch.cat(parts).unsqueeze(0), tuple(answers))


def documents(
    tokenizer: PreTrainedTokenizerBase, text: Text, count: int, length: int, facts: int, gap: int, seed: int
) -> list[Document]:
    """`count` documents of `length` tokens with `facts` facts each, asked for in an order of its own."""
    rng = random.Random(seed)
    result = []
    for filler in text.windows(count, length, first=0.25):
        stated = draw_facts(rng, facts)
        result.append(build(tokenizer, filler, stated, rng.sample(stated, facts), gap))
    return result


def answered(
    model: PreTrainedModel, contender: Contender, document: Document, chunk: int, advance: Advance
) -> list[bool]:
    """For every question of the document, whether the greedy answer is the true one, word for word."""
    return right(document, predict(model, contender, document.ids, document.positions, chunk, advance))


def right(document: Document, said: Predictions) -> list[bool]:
    """For every question, whether what was predicted at the document's `positions` is the true answer."""
    same = said.log_probs.argmax(dim=-1).cpu() == document.ids[0, document.positions + 1]
    return [bool(part.all()) for part in same.split([len(answer) for answer in document.answers])]
