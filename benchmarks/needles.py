"""Needle recall through a cache: facts spread over a long text, all asked for at its end.

A greedy answer is right when every token of it is the model's first choice, which one teacher-forced pass tells for
all questions of a document. A gap of plain text after the last fact keeps every fact out of the exact recent window.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.caches import Contender
from benchmarks.quality import Advance, predict
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


def question_and_answer(tokenizer: PreTrainedTokenizerBase, fact: Fact) -> tuple[Tensor, Tensor]:
    """Ids of the question and of the answer, split where those of both together first differ from the question's."""
    question, both = encode(tokenizer, fact.question), encode(tokenizer, fact.question + fact.answer)
    same = (both[: len(question)] == question[: len(both)]).long().cumprod(0).sum()
    return both[:same], both[same:]


def build(
    tokenizer: PreTrainedTokenizerBase, filler: Tensor, facts: Sequence[Fact], asked: Sequence[Fact], gap: int
) -> Document:
    """A document as long as `filler` [1, N]: text with `facts` in even steps, `gap` tokens of text, then the questions.

    Raises ValueError where the facts, the gap and the questions leave no room for a text.
    """
    statements = [encode(tokenizer, fact.statement) for fact in facts]
    pairs = [question_and_answer(tokenizer, fact) for fact in asked]
    end = encode(tokenizer, ".\n")
    used = sum(map(len, statements)) + sum(len(q) + len(a) + len(end) for q, a in pairs)
    room = filler.shape[1] - used - gap
    if room < len(facts) + 1:
        raise ValueError(
            f"{len(facts)} facts, their questions and a gap of {gap} tokens leave no room for text "
            f"in {filler.shape[1]} tokens"
        )
    text = filler[0]
    parts, last = [text[:1]], 1
    for index, statement in enumerate(statements):
        stop = 1 + (index + 1) * (room - 1) // len(facts) if len(facts) else 1
        middle = (last + stop) // 2
        parts += [text[last:middle], statement, text[middle:stop]]
        last = stop
    parts.append(text[last : room + gap])
    place, answers = sum(map(len, parts)), []
    for question, answer in pairs:
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
    chosen = predict(model, contender, document.ids, document.positions, chunk, advance).log_probs.argmax(dim=-1).cpu()
    right = chosen == document.ids[0, document.positions + 1]
    return [bool(part.all()) for part in right.split([len(answer) for answer in document.answers])]
