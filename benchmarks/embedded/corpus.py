"""The training corpus of the embedded model: books, Python source, and recall documents cut to a context length."""

from __future__ import annotations

import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from benchmarks.recall import draw_facts

END = "<|endoftext|>"
VOCABULARY = 4096

EVALUATION_BOOK = "tolstoy--war-and-peace.txt"

#: Modules of the standard library that training never sees: the default text of `python -m benchmarks quick`.
HELD_OUT_MODULES = (
    "argparse", "difflib", "inspect", "mailbox", "optparse", "shutil", "statistics", "subprocess", "tarfile",
    "textwrap", "turtle", "typing",
)  # fmt: skip


def standard_library(held_out: bool) -> list[str]:
    """The texts of the running Python's top-level library modules: the held-out ones, or all the others."""
    root = Path(sysconfig.get_paths()["stdlib"])
    if held_out:
        return [(root / f"{name}.py").read_text("utf-8") for name in HELD_OUT_MODULES]
    paths = sorted([*root.glob("*.py"), *root.glob("[a-z]*/*.py")])
    skipped = {"site-packages", "test", "tests", "lib2to3", "encodings", "idlelib"}
    kept = [p for p in paths if p.stem not in HELD_OUT_MODULES and not skipped & set(p.parts)]
    return [p.read_text("utf-8", errors="ignore") for p in kept]


def books(folder: Path) -> list[str]:
    """All books of the folder but the evaluation book."""
    return [p.read_text("utf-8") for p in sorted(folder.glob("*.txt")) if p.name != EVALUATION_BOOK]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE of VOCABULARY entries, digits apart, END put before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = tokenizer.token_to_id(END)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A $B", special_tokens=[(END, end)]
    )
    return tokenizer


@dataclass(frozen=True)
class Shares:
    """Of all sequences: how many carry facts, are Python source, or repeat a random run of tokens; the rest is prose.

    spacing: tokens of document that each fact has at least. amid_code: the share of recall documents whose facts stand
    in Python source, not in prose.
    """

    recall: float
    code: float
    repeat: float
    spacing: int
    amid_code: float = 0.0


class Mixture:
    """Endless batches of token windows, each opened by END, drawn by `Shares`.

    `batch` returns ids and loss weights, both [rows, context + 1]; the tokens of an answer weigh `answer_weight`, since
    they are few, those of a random run weigh nothing until it is repeated.
    """

    def __init__(
        self, tokenizer: Tokenizer, prose: np.ndarray, code: np.ndarray, seed: int, answer_weight: float = 4.0
    ):
        self.tokenizer, self.prose, self.code = tokenizer, prose, code
        self.rng = random.Random(seed)
        self.answer_weight = answer_weight
        self.end = tokenizer.token_to_id(END)

    def batch(self, rows: int, context: int, shares: Shares) -> tuple[np.ndarray, np.ndarray]:
        pairs = [self._sequence(context + 1, shares) for _ in range(rows)]
        return np.stack([ids for ids, _ in pairs]), np.stack([weights for _, weights in pairs])

    def _sequence(self, length: int, shares: Shares) -> tuple[np.ndarray, np.ndarray]:
        draw = self.rng.random()
        if draw < shares.recall:
            return self._recall_document(length, shares)
        if draw < shares.recall + shares.repeat:
            return self._repetition(length)
        ids = self._window(self.code if draw < shares.recall + shares.repeat + shares.code else self.prose, length - 1)
        return np.concatenate([[self.end], ids]), np.ones(length, np.float32)

    def _repetition(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """A run of random tokens, over and over: what teaches a small model to look back soonest."""
        run = self.rng.randint(min(16, length // 2), length // 2)
        tokens = np.array([self.rng.randrange(1, VOCABULARY) for _ in range(run)], np.int64)
        ids = np.concatenate([[self.end], np.tile(tokens, length // run + 1)])[:length]
        weights = np.ones(length, np.float32)
        weights[1 : run + 1] = 0.0
        return ids, weights

    def _window(self, stream: np.ndarray, length: int) -> np.ndarray:
        start = self.rng.randrange(len(stream) - length)
        return stream[start : start + length].astype(np.int64)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _recall_document(self, length: int, shares: Shares) -> tuple[np.ndarray, np.ndarray]:
        """Facts at random places of the first part of a window, each asked for once in the rest."""
        stream = self.code if shares.amid_code and self.rng.random() < shares.amid_code else self.prose
        facts = draw_facts(self.rng, min(self.rng.randint(2, max(2, length // shares.spacing)), 48))
        statements = [(self._encode(f.statement), 0) for f in facts]
        questions = []
        for fact in self.rng.sample(facts, len(facts)):
            answer = self._encode(fact.answer)
            questions.append((self._encode(fact.question) + answer + self._encode(".\n"), len(answer)))
        used = 1 + sum(len(ids) for ids, _ in statements + questions)
        filler = self._window(stream, max(length - used, 1))
        border = int(len(filler) * self.rng.uniform(0.3, 0.95))
        ids, weights = [self.end], [1.0]
        for part, items in ((filler[:border], statements), (filler[border:], questions)):
            cuts = sorted(self.rng.randrange(len(part) + 1) for _ in items)
            for (item, answer_length), start, stop in zip(items, [0, *cuts], cuts, strict=False):
                ids += [*part[start:stop], *item]
                weights += [1.0] * (stop - start + len(item) - answer_length - 2)
                weights += [self.answer_weight] * answer_length + [1.0, 1.0]
            rest = part[cuts[-1] :]
            ids += [*rest]
            weights += [1.0] * len(rest)
        return np.array(ids[:length], np.int64), np.array(weights[:length], np.float32)
