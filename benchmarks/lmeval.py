"""The job `python -m benchmarks lmeval`: tasks of lm-eval with the model reading through each cache.

    python -m benchmarks lmeval --model Qwen/Qwen3-8B --tasks "arc_challenge gsm8k" --specs "balanced trellis2" --chat

Tasks whose texts are shorter than what a cache keeps exact say nothing of it: the table's *coded* tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import lmeval_tables, subjects
from benchmarks.caches import UNCOMPRESSED, Contender, compressed
from benchmarks.lmeval_rows import Row, empty_row
from benchmarks.log import Log, open_log
from benchmarks.options import at_least
from benchmarks.progress import bar
from benchmarks.results import failed, installed
from kvcompress import DEFAULT_SPEC


@dataclass(frozen=True)
class Settings:
    """What to measure. tasks: names of tasks or groups; folder: of more tasks' YAML files; chunk in tokens.

    shots: examples before each question, None for the task's own number. limit: questions of a task, None for all.
    """

    tasks: tuple[str, ...]
    specs: tuple[str, ...] = (DEFAULT_SPEC,)
    model: str | None = None
    load_in_4bit: bool = False
    folder: Path | None = None
    shots: int | None = None
    limit: int | None = None
    chat: bool = False
    batch: int = 1
    chunk: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("no task is named; `lm-eval ls tasks` lists them")
        at_least(self, shots=0, limit=1, batch=1, chunk=1, seed=0)

    @property
    def of_rows(self) -> dict[str, Any]:
        """What a row depends on beside its key."""
        names = ("model", "load_in_4bit", "shots", "limit", "chat", "batch", "chunk")
        return {**{name: getattr(self, name) for name in names}, "folder": self.folder and str(self.folder)}

    @property
    def contenders(self) -> list[Contender]:
        return [UNCOMPRESSED, *map(compressed, self.specs)]


def manager_of(settings: Settings) -> Any:
    """lm-eval's list of tasks; raises ValueError where it is not installed, or does not know a task."""
    if find_spec("lm_eval") is None:
        raise ValueError("lm-eval is not installed: pip install -c constraints.txt -e '.[eval]'")
    from lm_eval.tasks import TaskManager

    if settings.folder is not None:
        if not settings.folder.is_dir():
            raise ValueError(f"{settings.folder} is no folder of tasks")
        own = TaskManager(include_path=str(settings.folder), include_defaults=False)
        if set(settings.tasks) <= set(own.all_tasks):
            return own  # reading all of lm-eval's own tasks would take longer than many a run
    manager = TaskManager(include_path=None if settings.folder is None else str(settings.folder))
    unknown = [task for task in settings.tasks if task not in manager.all_tasks]
    if unknown:
        near = get_close_matches(unknown[0], manager.all_tasks)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ValueError(f"lm-eval knows no task {unknown[0]!r}{hint}; `lm-eval ls tasks` lists them")
    return manager


def evaluated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contender: Contender,
    manager: Any,
    settings: Settings,
    row: Row,
) -> Row:
    """The row with what lm-eval finds; raises whatever it or the cache raises."""
    from lm_eval import simple_evaluate

    from benchmarks.lm_eval_model import CachedLM

    lm = CachedLM(model, tokenizer, contender, settings.chunk, settings.batch)
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    found = simple_evaluate(
        model=lm,
        tasks=[row.task],
        num_fewshot=settings.shots,
        limit=settings.limit,
        apply_chat_template=settings.chat,
        task_manager=manager,
        log_samples=False,
        **dict.fromkeys(seeds, settings.seed),
    )
    return replace(
        row,
        metrics={name: numbers(own) for name, own in found["results"].items()},
        questions={name: own["effective"] for name, own in found["n-samples"].items()},
        tokens=lm.longest,
        bits_per_element=lm.bits_per_element,
        coded=lm.coded,
    )


def numbers(found: Mapping[str, Any]) -> dict[str, float]:
    """lm-eval's metrics and standard errors of a task, without its alias and what else it says of it."""
    return {name: float(value) for name, value in found.items() if "," in name and isinstance(value, Real)}


def run(settings: Settings, output: Path, console: Console, fresh: bool = False) -> list[Row]:
    """Measure what is not measured yet, and write everything that the folder `output` then holds.

    fresh: forget the rows that it holds. Raises ValueError for settings, specs or tasks that make no sense, where
    lm-eval is not installed, or the rows in the folder have other settings; OSError for a model that is not there.
    """
    chosen = settings.contenders  # a wrong spec or task is told before the model is loaded
    manager = manager_of(settings)
    more = {"lm_eval": installed("lm-eval"), "options": {**asdict(settings), "folder": settings.of_rows["folder"]}}
    log: Log[Row] = open_log(output, "lmeval", Row, settings.of_rows, fresh, **more)
    model, tokenizer = subjects.load(settings.model, settings.load_in_4bit)
    with bar(console, 48) as progress:
        under_way = progress.add_task("tasks", total=len(settings.tasks) * len(chosen))
        for task in settings.tasks:
            for contender in chosen:
                progress.update(under_way, description=f"{task}: {contender.name}")
                row = empty_row(task, settings.seed, contender)
                if not log.done(row.key):
                    try:
                        row = evaluated(model, tokenizer, contender, manager, settings, row)
                    except Exception as error:  # a cache that breaks is a result to show
                        row = failed(row, error)
                    log.add(row)
                progress.advance(under_way)
    log.rewrite()
    table = output / "table.md"
    table.write_text(lmeval_tables.document(log.rows, settings.model or "embedded model", remarks(log)))
    console.print(table.read_text(), markup=False)
    console.print(f"Written: {log.path}, {table}", markup=False, soft_wrap=True)
    return log.rows


def remarks(log: Log[Row]) -> list[str]:
    """What is to be said where the rows come from several states of the code."""
    if len(log.commits) < 2:
        return []
    return [f"The rows come from {len(log.commits)} states of the code: {', '.join(log.commits)}."]
