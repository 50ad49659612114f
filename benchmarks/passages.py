"""One document a seed that asks for everything in one pass: a text with facts in it, and questions about them.

    opening text | one fact | text | its question | text with many facts | gap | the questions about these

KL and perplexity are scored where the document is plain text; the first question is the single needle (one fact, no
other of its kind before it), the last ones are multi-key recall (every other fact distracts). Text lies between every
fact and its question: at least `gap` tokens, so that no fact is in the exact recent window when it is asked for.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from benchmarks.needles import question_and_answer
from benchmarks.quality import MOST_LOGITS
from benchmarks.recall import Fact, draw_facts
from benchmarks.texts import Text, encode

#: Tokens of document for each fact, and the most facts.
SPACING, MOST_FACTS = 128, 32


@dataclass(frozen=True)
class Passage:
    """ids [1, N]; text: bool [N], the tokens that are plain text; where the answers stand (ranges of positions)."""

    ids: Tensor
    text: Tensor
    needle: tuple[range, ...] = ()
    keys: tuple[range, ...] = ()

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def scored(self, vocabulary: int) -> Tensor:
        """Positions [n] whose next token is scored: from `first_scored` on, text before and after, thinned evenly.

        No more than MOST_LOGITS allows for a vocabulary of this size.
        """
        start = first_scored(self.length)
        plain = (self.text[start:-1] & self.text[start + 1 :]).nonzero().flatten() + start
        count = max(1, min(len(plain), MOST_LOGITS // vocabulary))
        return plain[torch.linspace(0, len(plain) - 1, count, dtype=torch.float64).round().long()]


def first_scored(length: int) -> int:
    """512, a quarter of a long document, half of a short one: what is predicted before attends few codes or none."""
    return min(max(512, length // 4), length // 2)


class Writer:
    """A document in the making."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.plain: list[bool] = []

    def write(self, ids: Tensor, plain: bool) -> range:
        """Append tokens [n]; returns the positions that they take."""
        start = len(self.plain)
        self.parts.append(ids)
        self.plain += [plain] * len(ids)
        return range(start, len(self.plain))

    def passage(self, needle: Sequence[range], keys: Sequence[range]) -> Passage:
        return Passage(torch.cat(self.parts).unsqueeze(0), torch.tensor(self.plain), tuple(needle), tuple(keys))


def compose(
    tokenizer: PreTrainedTokenizerBase, filler: Tensor, facts: Sequence[Fact], order: Sequence[int], gap: int, at: float
) -> Passage:
    """A document as long as `filler` [1, N], of which it takes the first tokens for its text.

    facts: the single needle, then the others; order: in which of these others are asked for; at: where the needle
    stands, 0 to 1 of the room that it has. Raises ValueError where there is no room for all of it.
    """
    single, *others = facts
    statements = [encode(tokenizer, fact.statement) for fact in facts]
    end = encode(tokenizer, ".\n")
    pairs = [question_and_answer(tokenizer, fact) for fact in (single, *(others[index] for index in order))]
    used = sum(map(len, statements)) + sum(len(q) + len(a) + len(end) for q, a in pairs)
    free = filler.shape[1] - used - 2 * gap
    if free < 6 * len(facts):
        raise ValueError(
            f"{len(facts)} facts, their questions and two gaps of {gap} tokens leave no room for text in "
            f"{filler.shape[1]} tokens"
        )
    text, writer = iter(filler[0].tolist()), Writer()

    def plain(count: int) -> None:
        writer.write(torch.tensor([next(text) for _ in range(count)], dtype=torch.int64), plain=True)

    def ask(pair: tuple[Tensor, Tensor]) -> range:
        writer.write(pair[0], plain=False)
        answer = writer.write(pair[1], plain=False)
        writer.write(end, plain=False)
        return answer

    opening = 1 + int(at * (free // 6 - 1))
    plain(opening)
    writer.write(statements[0], plain=False)
    plain(gap + free // 3 - opening)
    needle = ask(pairs[0])
    rest = free - free // 3
    for index, statement in enumerate(statements[1:]):
        plain((index + 1) * rest // len(others) - index * rest // len(others))
        writer.write(statement, plain=False)
    plain(gap if others else gap + rest)
    return writer.passage([needle], [ask(pair) for pair in pairs[1:]])


def with_facts(tokenizer: PreTrainedTokenizerBase, text: Text, length: int, gap: int, seed: int) -> Passage:
    """A document of `length` tokens from a place of the text, with facts and questions, all drawn by `seed`.

    A fact for every SPACING tokens, fewer where there is no room for so many; plain text where there is for none.
    Raises ValueError where the text is shorter than that.
    """
    rng = random.Random(seed)
    filler = window(text, length, rng)
    count = min(length // SPACING, MOST_FACTS)
    while count > 0:
        facts, order, at = draw_facts(rng, count + 1), rng.sample(range(count), count), rng.random()
        try:
            return compose(tokenizer, filler, facts, order, gap, at)
        except ValueError:
            count //= 2
    return plain_text(filler)


def window(text: Text, length: int, rng: random.Random) -> Tensor:
    """`length` tokens [1, length] of the text from a place drawn by `rng`, opened by the tokenizer's prefix."""
    body = length - len(text.prefix)
    if body > len(text.ids):
        raise ValueError(f"{text.name} has {len(text.ids)} tokens, too few for a document of {length}")
    start = rng.randrange(len(text.ids) - body + 1)
    return torch.cat([text.prefix, text.ids[start : start + body]]).unsqueeze(0)


def plain_text(ids: Tensor) -> Passage:
    """A document without facts from ids [1, N]."""
    return Passage(ids, torch.ones(ids.shape[1], dtype=torch.bool))
