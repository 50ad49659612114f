"""The subjects of `python -m benchmarks quality`: what the caches are measured on, and at which contexts."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import spectra, subjects, texts
from benchmarks.cases import Case, ModelCase
from benchmarks.embedded.corpus import EVALUATION_BOOK
from benchmarks.hard import harden
from benchmarks.passages import Passage, plain_text, with_facts
from benchmarks.spectra import TensorCase
from benchmarks.texts import Text
from kvcompress.store import PAGE

if TYPE_CHECKING:
    from benchmarks.frontier import Settings

#: What `--subjects` may name.
SUBJECTS = ("embedded", "embedded-hard", "stories260k", "spectra")

#: Data handed over beside the repository; what needs it is left out where it is absent.
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

WINDOW = 128  # exact recent tokens of a cache that does not say otherwise: facts lie further back than these
STORIES_WINDOW, STORIES_CONTEXT, STORIES_DOCUMENTS, STORY_BEGINS = 32, 512, 4, 1


@dataclass(frozen=True)
class Subject:
    """open(context, seed) makes the case, reading the uncompressed model; window: as in `caches.field`."""

    name: str
    contexts: tuple[int, ...]
    window: int | None
    open: Callable[[int, int], Case]


def chunk_of(chunk: int, context: int) -> int:
    """Tokens fed at a time: an eighth of the context at most, so that most tokens attend codes."""
    return max(1, min(chunk, context // 8))


def gather(settings: Settings, data: Path = DATA) -> tuple[list[Subject], list[str]]:
    """The subjects that the settings name and this machine has, and why the others are left out.

    Raises OSError for a model or text that is not there.
    """
    found, remarks = [], []
    longest = max(settings.contexts)
    name = settings.model or "embedded"
    for each in settings.subjects:
        if each == "embedded":
            found.append(Subject(name, settings.contexts, None, _reader(settings, data, hard=False)))
        elif each == "embedded-hard":
            found.append(Subject(f"{name}-hard", (longest,), None, _reader(settings, data, hard=True)))
        elif each == "stories260k":
            folder = data / "stories260k"
            context = min(longest, STORIES_CONTEXT - settings.greedy)
            if not (folder / "tinystories_ids.npy").exists():
                remarks.append(f"{each}: left out, {folder} is not there")
            elif context < texts.SHORTEST:
                remarks.append(
                    f"{each}: left out, {settings.greedy} greedy tokens leave no context of its {STORIES_CONTEXT}"
                )
            else:
                found.append(Subject(each, (context,), STORIES_WINDOW, _stories(settings, folder)))
        elif each == "spectra":
            path = data / "spectra" / "kv_spectra.json"
            if not path.exists():
                remarks.append(f"{each}: left out, {path} is not there")
            else:
                found.append(Subject(each, (longest,), None, _tensors(settings, path)))
    return found, remarks


def default_text(data: Path) -> Path | None:
    """The book that training never saw, None where it is not there: the held-out library modules then."""
    book = data / "books" / EVALUATION_BOOK
    return book if book.exists() else None


@cache
def _loaded(
    model: str | None, path: Path | None, load_in_4bit: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Text]:
    loaded, tokenizer = subjects.load(model, load_in_4bit)
    return loaded, tokenizer, texts.load(tokenizer, path, seed=0)


def _reader(settings: Settings, data: Path, hard: bool) -> Callable[[int, int], Case]:
    """Documents with facts, read by the model or by a hard variant of it that the seed draws."""
    path = settings.text or default_text(data)

    def open_case(context: int, seed: int) -> Case:
        model, tokenizer, text = _loaded(settings.model, path, settings.load_in_4bit)
        chunk = chunk_of(settings.chunk, context)
        # PAGE: a window is up to a page longer before its oldest tokens are coded
        passage = with_facts(tokenizer, text, context, chunk + WINDOW + PAGE, seed)
        return ModelCase(harden(model, seed) if hard else model, [passage], chunk, settings.greedy)

    return open_case


def _stories(settings: Settings, folder: Path) -> Callable[[int, int], Case]:
    """Stories, each document from the beginning of one on."""

    def open_case(context: int, seed: int) -> Case:
        model = _story_model(folder)
        passages = story_documents(folder / "tinystories_ids.npy", context, seed)
        return ModelCase(model, passages, chunk_of(settings.chunk, context), settings.greedy)

    return open_case


@cache
def _story_model(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def story_documents(path: Path, context: int, seed: int) -> list[Passage]:
    """STORIES_DOCUMENTS documents of `context` tokens, from beginnings of stories that `seed` draws."""
    ids = torch.from_numpy(np.load(path).astype(np.int64))
    begins = (ids[: len(ids) - context + 1] == STORY_BEGINS).nonzero().flatten().tolist()
    starts = random.Random(seed).sample(begins, STORIES_DOCUMENTS)
    return [plain_text(ids[start : start + context].unsqueeze(0)) for start in starts]


def _tensors(settings: Settings, path: Path) -> Callable[[int, int], Case]:
    def open_case(context: int, seed: int) -> Case:
        return TensorCase(spectra.synthesise(path, context, seed), chunk_of(settings.chunk, context))

    return open_case
