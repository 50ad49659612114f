"""The documents of `python -m benchmarks retrieval`: four tasks in RULER's manner (arXiv 2404.06654).

Any text is the haystack, and what is looked for is put into it with the model's own tokenizer. All is asked for at the
end, behind a gap of plain text, so that nothing asked for is in a cache's exact recent window.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from benchmarks.needles import Asked, Document, assemble, even_steps
from benchmarks.passages import SPACING, window
from benchmarks.recall import NAMES, Fact, draw_facts, draw_value
from benchmarks.texts import Text

#: What is stated, each at its depth in the text, and what is asked.
Composed = tuple[list[tuple[float, str]], list[Asked]]


@dataclass(frozen=True)
class Shape:
    """What a document is to hold. tokens: its length; depth: of a single needle, 0 to 1 of the text before the gap.

    keys: facts of a multi-key document, one for every SPACING tokens at most. values: of one key. hops: assignments of
    a chain after its first.
    """

    tokens: int
    depth: float = 0.5
    keys: int = 32
    values: int = 4
    hops: int = 4


def document(task: str, tokenizer: PreTrainedTokenizerBase, text: Text, shape: Shape, gap: int, seed: int) -> Document:
    """A document of a task from a place of the text and with words that the seed draws; `gap` in tokens.

    Raises ValueError where there is no room for what the shape names, or the text is too short.
    """
    rng = random.Random(f"{task} {shape.tokens} {shape.depth} {seed}")
    filler = window(text, shape.tokens, rng)
    stated, asked = TASKS[task].compose(rng, shape)
    return assemble(tokenizer, filler, stated, asked, gap)


def needle(rng: random.Random, shape: Shape) -> Composed:
    """One fact at the shape's depth."""
    (fact,) = draw_facts(rng, 1)
    return [(shape.depth, fact.statement)], [Asked(fact.question, fact.answer)]


def multi_key(rng: random.Random, shape: Shape) -> Composed:
    """Facts of one form about many names, each asked for: all the others distract."""
    facts = draw_facts(rng, max(1, min(shape.keys, shape.tokens // SPACING, len(NAMES))))
    stated = list(zip(even_steps(len(facts)), [fact.statement for fact in facts], strict=True))
    return stated, [Asked(fact.question, fact.answer) for fact in rng.sample(facts, len(facts))]


def multi_value(rng: random.Random, shape: Shape) -> Composed:
    """Several facts about one name, whose values are asked for in the order in which they stand."""
    (fact,) = draw_facts(rng, 1)
    values = [fact.value]
    while len(values) < shape.values:
        values = list(dict.fromkeys([*values, draw_value(rng)]))
    stated = zip(even_steps(len(values)), [Fact(fact.name, value).statement for value in values], strict=True)
    question = f"\nRecall: the passwords of {fact.name}, in the order of the text, are"
    return list(stated), listed(question, values, ",")


def variable_tracking(rng: random.Random, shape: Shape) -> Composed:
    """A chain of assignments from one number on, among those of another: all variables of its value are asked for.

    Before the text stands an example, a chain of one hop with its question and answer, as RULER has it.
    """
    numbers = [str(number) for number in rng.sample(range(10_000, 100_000), 3)]
    chains = [variables(rng, length) for length in (2, shape.hops + 1, shape.hops + 1)]
    example, asked, other = (assignments(chain, number) for chain, number in zip(chains, numbers, strict=True))
    lines = [asked.pop(0) if of_asked else other.pop(0) for of_asked in shuffled([True, False], len(asked), rng)]
    shown = "".join(example) + tracking_question(numbers[0], 2) + " " + " ".join(chains[0]) + ".\n"
    stated = [(0.0, shown), *zip(even_steps(len(lines)), lines, strict=True)]
    return stated, listed(tracking_question(numbers[1], len(chains[1])), chains[1], "")


def variables(rng: random.Random, count: int) -> list[str]:
    """Names of five capitals."""
    return ["".join(rng.choices(string.ascii_uppercase, k=5)) for _ in range(count)]


def assignments(chain: Sequence[str], number: str) -> list[str]:
    """The first variable is given the number, each further one the variable before it."""
    values = [number, *(f"VAR {name}" for name in chain[:-1])]
    return [f"\nVAR {name} = {value}\n" for name, value in zip(chain, values, strict=True)]


def tracking_question(number: str, count: int) -> str:
    return (
        f"\nQuestion: Find all variables that are assigned the value {number} in the text above. Answer: According to "
        f"the chain(s) of variable assignment in the text above, {count} variables are assigned the value {number}, "
        "they are:"
    )


def shuffled(kinds: Sequence[bool], each: int, rng: random.Random) -> list[bool]:
    """`each` of every kind, in an order that is drawn."""
    return rng.sample(kinds, len(kinds) * each, counts=[each] * len(kinds))


def listed(question: str, answers: Sequence[str], between: str) -> list[Asked]:
    """A question with several answers, each of which is scored, given those before it."""
    leads = [question, *[between] * (len(answers) - 1)]
    ends = [*[""] * (len(answers) - 1), ".\n"]
    return [Asked(lead, f" {answer}", end) for lead, answer, end in zip(leads, answers, ends, strict=True)]


@dataclass(frozen=True)
class Task:
    """say: what is asked, for readers of the tables. deep: whether what is looked for stands at one depth."""

    say: str
    compose: Callable[[random.Random, Shape], Composed]
    deep: bool = False


#: By the names of `--tasks`.
TASKS = {
    "needle": Task("one fact, at a depth of its own, asked for at the end", needle, deep=True),
    "multi-key": Task("many facts of the same form, each asked for: the others distract", multi_key),
    "multi-value": Task("several values of one key, asked for in the order of the text", multi_value),
    "variables": Task("two chains of assignments; all variables of one value are asked for", variable_tracking),
}
