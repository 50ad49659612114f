"""Token windows of text that no training saw: the running Python's held-out modules, or a file of the user's."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from benchmarks.embedded.corpus import standard_library

#: A shorter text says nothing about a compressed history (tokens).
SHORTEST = 64


@dataclass(frozen=True)
class Text:
    """A tokenised text. ids: int64 [tokens] without special tokens; prefix: what the tokenizer puts before any text."""

    ids: Tensor
    prefix: Tensor
    name: str

    def windows(self, count: int, length: int, first: float = 0.5) -> list[Tensor]:
        """`count` windows [1, length] in even steps, each opened by the prefix.

        first: where the first one starts, as a share of a step, so that two sets can keep apart.
        Raises ValueError where the text is too short for one.
        """
        body = length - len(self.prefix)
        room = len(self.ids) - body
        if body < 1 or room < 0:
            raise ValueError(f"{self.name} has {len(self.ids)} tokens, too few for a window of {length}")
        starts = [int((index + first) * room / count) for index in range(count)]
        return [torch.cat([self.prefix, self.ids[start : start + body]]).unsqueeze(0) for start in starts]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """The ids of a piece of text, int64 [tokens], without special tokens and without a warning about its length."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)


def load(tokenizer: PreTrainedTokenizerBase, path: Path | None, seed: int) -> Text:
    """The file's text, or else the held-out library modules in an order drawn from `seed`.

    Raises OSError where the file cannot be read, ValueError where it holds fewer than SHORTEST tokens.
    """
    if path is None:
        modules = standard_library(held_out=True)
        random.Random(seed).shuffle(modules)
        text, name = "\n".join(modules), "the held-out modules of the standard library"
    else:
        text, name = path.read_text("utf-8"), str(path)
    ids = encode(tokenizer, text)
    if len(ids) < SHORTEST:
        raise ValueError(f"{name} has {len(ids)} tokens; at least {SHORTEST} are needed")
    prefix = torch.tensor(tokenizer("").input_ids[:1], dtype=torch.int64)
    return Text(ids, prefix, name)
