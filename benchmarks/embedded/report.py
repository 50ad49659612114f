"""What the embedded model can do: ``python -m benchmarks.embedded.report WAR_AND_PEACE.txt``.

Bits per byte of the same tokens of a book given 512, 2048 and 4096 tokens of context; recall of facts amid its text.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import needles, subjects, texts
from benchmarks.caches import UNCOMPRESSED
from benchmarks.quality import predict
from benchmarks.texts import Text

CONTEXTS = (512, 2048, 4096)
RECALL_LENGTHS = (512, 1024, 2048, 4096)
SCORED = 256  # last tokens of a window
SEED = 20261122


def progress(items: list[Tensor] | list[needles.Document], label: str) -> Iterable:
    return tqdm(items, desc=label, file=sys.stderr, leave=False)


def bits_per_byte(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: list[Tensor], context: int
) -> float:
    """Of the last SCORED tokens of every window [1, N], the window cut to its last `context` tokens, its opening kept.

    A byte-level tokenizer is expected: one character of a token's name stands for one byte of text.
    """
    bits, size = 0.0, 0
    for window in progress(windows, f"bits per byte at {context}"):
        ids = torch.cat([window[:, :1], window[:, 1 - context :]], dim=1)
        positions = torch.arange(context - SCORED - 1, context - 1)
        log_probs = predict(model, UNCOMPRESSED, ids, positions, context, lambda tokens: None).log_probs
        targets = ids[0, positions + 1]
        bits -= log_probs.gather(1, targets.to(log_probs.device)[:, None]).double().sum().item() / math.log(2)
        size += sum(map(len, tokenizer.convert_ids_to_tokens(targets.tolist())))
    return bits / size


def recall(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, book: Text, length: int, count: int) -> float:
    """Share of questions answered word for word in `count` documents of `length` tokens, a fact for every 64 of them.

    At most 48 facts, as in training; none in the last eighth of the text before the questions.
    """
    facts = min(length // 64, 48)
    papers = needles.documents(tokenizer, book, count, length, facts, length // 8, SEED)
    right = [
        answer
        for paper in progress(papers, f"recall at {length}")
        for answer in needles.answered(model, UNCOMPRESSED, paper, length, lambda tokens: None)
    ]
    return sum(right) / len(right)


def report(
    book: Annotated[Path, typer.Argument(help="a book that training never saw")],
    model: Annotated[str | None, typer.Option(help="folder of an exported model  [default: the embedded one]")] = None,
    windows: Annotated[int, typer.Option(help="windows for bits per byte")] = 40,
    documents: Annotated[int, typer.Option(help="documents for recall at each length")] = 50,
    output: Annotated[Path | None, typer.Option(help="file for the JSON, which is printed too")] = None,
) -> None:
    """Print bits per byte by context and recall by length, as JSON."""
    subject, tokenizer = subjects.load(model)
    text = texts.load(tokenizer, book, SEED)
    passages = text.windows(windows, max(CONTEXTS))
    content = {
        "book": book.name,
        "parameters": sum(parameter.numel() for parameter in subject.parameters()),
        "windows": windows,
        "scored_tokens": windows * SCORED,
        "bits_per_byte": {str(c): bits_per_byte(subject, tokenizer, passages, c) for c in CONTEXTS},
        "documents": documents,
        "recall": {str(n): recall(subject, tokenizer, text, n, documents) for n in RECALL_LENGTHS},
    }
    line = json.dumps(content, indent=1)
    print(line)
    if output is not None:
        output.write_text(line + "\n")


if __name__ == "__main__":
    typer.run(report)
