"""The main job: every cache on one model and one text, its size, quality, recall and speed side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import needles, quality, results, subjects, texts, timing
from benchmarks.caches import SPECS, UNCOMPRESSED, Contender, contenders
from benchmarks.needles import Document
from benchmarks.options import at_least
from benchmarks.progress import bar
from benchmarks.quality import Advance, Predictions
from benchmarks.results import Result, failed
from benchmarks.storage import footprint
from benchmarks.texts import Text

#: Exact tokens that QuantizedCache and our default keep at the end: facts lie further back than these and a chunk.
WINDOW = 128


@dataclass(frozen=True)
class Settings:
    """What to measure: lengths in tokens, `text` and `model` None for the default, `step_context` 0 for no timing."""

    model: str | None = None
    text: Path | None = None
    specs: tuple[str, ...] = SPECS
    baselines: bool = True
    context: int = 3072
    passages: int = 1
    documents: int = 1
    facts: int = 48
    chunk: int = 512
    step_context: int = 8192
    steps: int = 7
    seed: int = 0
    load_in_4bit: bool = False

    def __post_init__(self) -> None:
        at_least(self, context=texts.SHORTEST, passages=1, documents=0, facts=1, chunk=1, steps=1, seed=0)
        if self.step_context and self.step_context <= timing.START:
            raise ValueError(f"step_context must be 0 or more than {timing.START} tokens, got {self.step_context}")


@dataclass(frozen=True)
class Material:
    """The tokens of a run: passages [1, N], the positions that are scored in each of them, and recall documents."""

    passages: list[Tensor]
    positions: Tensor
    documents: list[Document]

    @property
    def targets(self) -> list[Tensor]:
        return [ids[0, self.positions + 1] for ids in self.passages]

    @property
    def tokens(self) -> int:
        """What one cache is fed."""
        return sum(ids.shape[1] for ids in [*self.passages, *(document.ids for document in self.documents)])


def fitted(settings: Settings, text: Text) -> Settings:
    """The settings with no more context, and no more passages of it, than the text has."""
    context = min(settings.context, len(text.ids) + len(text.prefix))
    return replace(settings, context=context, passages=min(settings.passages, max(1, len(text.ids) // context)))


def gather(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: Text, settings: Settings) -> Material:
    """Passages and documents; raises ValueError where the context has no room for the facts."""
    passages = text.windows(settings.passages, settings.context)
    positions = quality.scored_positions(settings.context, model.config.get_text_config().vocab_size)
    gap = settings.chunk + WINDOW
    documents = needles.documents(
        tokenizer, text, settings.documents, settings.context, settings.facts, gap, settings.seed
    )
    return Material(passages, positions, documents)


def read(
    model: PreTrainedModel, contender: Contender, material: Material, chunk: int, advance: Advance
) -> list[Predictions]:
    """What the model predicts in every passage through a cache."""
    return [quality.predict(model, contender, ids, material.positions, chunk, advance) for ids in material.passages]


def measured(
    model: PreTrainedModel,
    contender: Contender,
    material: Material,
    reference: list[Predictions],
    chunk: int,
    advance: Advance,
) -> Result:
    """Size, quality, recall and prefill speed of one cache; raises whatever the cache raises."""
    found = reference if contender is UNCOMPRESSED else read(model, contender, material, chunk, advance)
    size = footprint(found[-1].cache, reference[-1].cache)
    score = quality.compare(
        [each.log_probs for each in reference], [each.log_probs for each in found], material.targets
    )
    answers = [
        right
        for document in material.documents
        for right in needles.answered(model, contender, document, chunk, advance)
    ]
    tokens = sum(ids.shape[1] for ids in material.passages)
    return replace(
        empty_row(contender),
        **size.fields(),
        compression=size.compression,
        **score.fields(),
        recall=sum(answers) / len(answers) if answers else None,
        questions=len(answers),
        prefill_tokens_per_second=tokens / sum(each.seconds for each in found),
    )


def empty_row(contender: Contender) -> Result:
    return Result(contender.name, contender.library, contender.content)


def timed(rows: Sequence[Result], seconds: dict[str, float | Exception]) -> list[Result]:
    """The rows with their decode steps, in milliseconds and over the uncompressed cache's."""
    base = seconds.get(UNCOMPRESSED.name)
    result = []
    for row in rows:
        taken = seconds.get(row.cache)
        if isinstance(taken, Exception):
            row = failed(row, taken)
        elif taken is not None:
            ratio = taken / base if isinstance(base, float) else None
            row = replace(row, step_milliseconds=1000 * taken, step_ratio=ratio)
        result.append(row)
    return result


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: Text, settings: Settings, progress: Progress
) -> list[Result]:
    """One row for every cache, in the order of `contenders`; raises only what the uncompressed cache raises."""
    chosen = contenders(settings.specs, settings.baselines)
    present = [contender for contender in chosen if contender.missing is None]
    material = gather(model, tokenizer, text, settings)
    task = progress.add_task(UNCOMPRESSED.name, total=material.tokens * len(present))

    def advance(tokens: int) -> None:
        progress.advance(task, tokens)

    reference = read(model, UNCOMPRESSED, material, settings.chunk, advance)
    rows: dict[str, Result] = {}
    for contender in chosen:
        if contender.missing is not None:
            rows[contender.name] = replace(empty_row(contender), status="not installed", reason=contender.missing)
            continue
        progress.update(task, description=contender.name)
        try:
            rows[contender.name] = measured(model, contender, material, reference, settings.chunk, advance)
        except Exception as error:  # a cache that breaks is a result to show
            rows[contender.name] = failed(empty_row(contender), error)
        progress.update(task, completed=material.tokens * sum(other.name in rows for other in present))
    if not settings.step_context:
        return list(rows.values())
    running = [contender for contender in present if rows[contender.name].status == "ok"]
    task = progress.add_task("decode steps", total=len(running) + timing.WARM_UP + settings.steps)
    seconds = timing.decode_steps(
        model, running, settings.step_context, settings.steps, settings.seed, lambda: progress.advance(task)
    )
    return timed(list(rows.values()), seconds)


def save(folder: Path, rows: Sequence[Result], shared: dict[str, Any], title: str) -> list[Path]:
    """Write results.jsonl, table.md and bits-kl.png into the folder; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, table, picture = (folder / name for name in ("results.jsonl", "table.md", "bits-kl.png"))
    results.write_lines(lines, rows, shared)
    table.write_text(results.markdown_table(rows) + "".join(f"\n{line}\n" for line in results.remarks(rows)))
    results.plot(picture, rows, title)
    return [lines, table, picture]


def run(settings: Settings, output: Path, console: Console) -> list[Result]:
    """Measure, print the table, and leave the results in the folder `output`.

    Raises ValueError for settings or a spec that make no sense and OSError for a text or model that is not there.
    """
    contenders(settings.specs)  # a wrong spec is told before the model is loaded
    model, tokenizer = subjects.load(settings.model, settings.load_in_4bit)
    text = texts.load(tokenizer, settings.text, settings.seed)
    settings = fitted(settings, text)
    with bar(console, 24) as progress:
        rows = measure(model, tokenizer, text, settings, progress)
    shared = {
        "benchmark": "quick",
        "settings": {**asdict(settings), "text": settings.text and str(settings.text)},
        **results.environment(str(model.device), torch.get_num_threads()),
    }
    name = settings.model or "embedded model"
    title = f"{name}, {settings.context} tokens in chunks of {settings.chunk}; decode steps at {settings.step_context}"
    written = save(output, rows, shared, title)
    console.print(*results.rich_tables(rows, title, console.width))
    for remark in results.remarks(rows):
        console.print(remark, style="yellow", markup=False)
    console.print("Written: " + ", ".join(map(str, written)), markup=False, soft_wrap=True)
    return rows
