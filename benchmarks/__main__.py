"""``python -m benchmarks``: one sub-command a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import (
    compare_command,
    frontier,
    guard_command,
    latency_command,
    lmeval_command,
    memory_command,
    million_command,
    offload_command,
    parallel_command,
    prefix_command,
    report_command,
    retrieval_command,
    scaling_command,
    soak_command,
)
from benchmarks import gpu as gpu_job
from benchmarks import quick as quick_job
from benchmarks import static as static_job
from benchmarks.caches import SPECS
from benchmarks.frontier_subjects import SUBJECTS
from benchmarks.options import LoadIn4Bit, Model, Resume, telling_errors, whole_numbers
from benchmarks.quick import Settings

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.callback()
def root() -> None:
    """Benchmarks of kvcompress."""


@app.command()
def quick(
    specs: Annotated[str, typer.Option(help="specs of ours to measure, with spaces between")] = " ".join(SPECS),
    baselines: Annotated[bool, typer.Option(help="measure transformers' QuantizedCache too")] = True,
    model: Model = None,
    load_in_4bit: LoadIn4Bit = False,
    text: Annotated[
        Path | None, typer.Option(help="text file  [default: library modules that training never saw]")
    ] = None,
    context: Annotated[int, typer.Option(help="tokens of a passage and of a recall document")] = Settings.context,
    passages: Annotated[int, typer.Option(help="passages for perplexity and KL")] = Settings.passages,
    documents: Annotated[int, typer.Option(help="documents for recall; 0: none")] = Settings.documents,
    facts: Annotated[int, typer.Option(help="facts in a document, each asked for once")] = Settings.facts,
    chunk: Annotated[int, typer.Option(help="tokens fed at a time")] = Settings.chunk,
    step_context: Annotated[
        int, typer.Option(help="context of the timed decode steps; 0: none")
    ] = Settings.step_context,
    steps: Annotated[int, typer.Option(help="timed decode steps for each cache")] = Settings.steps,
    seed: Annotated[int, typer.Option(help="what is drawn: the order of modules, facts and questions")] = Settings.seed,
    output: Annotated[Path, typer.Option(help="folder for results.jsonl, table.md and bits-kl.png")] = Path(
        "benchmarks/results/quick"
    ),
) -> None:
    """Size, perplexity, KL, recall and speed of every cache on held-out text, in about three minutes."""
    with telling_errors():
        settings = Settings(
            model,
            text,
            tuple(specs.split()),
            baselines,
            context,
            passages,
            documents,
            facts,
            chunk,
            step_context,
            steps,
            seed,
            load_in_4bit,
        )
        quick_job.run(settings, output, Console())


@app.command()
def quality(
    subjects: Annotated[str, typer.Option(help="what to measure on, with spaces between")] = " ".join(SUBJECTS),
    contexts: Annotated[
        str, typer.Option(help="tokens of context, with spaces between; all subjects but the first take the longest")
    ] = " ".join(map(str, frontier.Settings.contexts)),
    specs: Annotated[str | None, typer.Option(help="specs to measure  [default: all of ours in the list]")] = None,
    baselines: Annotated[bool, typer.Option(help="measure the peers' methods and QuantizedCache too")] = True,
    model: Annotated[
        str | None, typer.Option(help="model folder or hub id in place of the embedded model  [default: that]")
    ] = None,
    load_in_4bit: LoadIn4Bit = False,
    text: Annotated[
        Path | None, typer.Option(help="text file  [default: War and Peace where it is, else held-out library modules]")
    ] = None,
    seeds: Annotated[int, typer.Option(help="seeds: other places of the text, facts, hard variants, tensors")] = 3,
    chunk: Annotated[int, typer.Option(help="tokens fed at a time; an eighth of the context at most")] = 512,
    greedy: Annotated[int, typer.Option(help="tokens of greedy decoding that are compared; 0: none")] = 64,
    resume: Resume = True,
    output: Annotated[Path, typer.Option(help="folder for results.jsonl, frontier.png, pareto.md, reading.md")] = Path(
        "benchmarks/results/quality"
    ),
) -> None:
    """Every codec and rate on one picture, quality against measured bits; a killed run goes on where it was."""
    with telling_errors():
        settings = frontier.Settings(
            tuple(subjects.split()),
            whole_numbers(contexts, "contexts"),
            None if specs is None else tuple(specs.split()),
            baselines,
            model,
            text,
            seeds,
            chunk,
            greedy,
            load_in_4bit,
        )
        frontier.run(settings, output, Console(), fresh=not resume)


@app.command()
def static(
    arch: Annotated[str, typer.Option(help="chips, with spaces between  [default: all]")] = "",
    kernel: Annotated[str, typer.Option(help="kernels, with spaces between  [default: all]")] = "",
    codec: Annotated[str, typer.Option(help="codecs, with spaces between  [default: all]")] = "",
    head_dim: Annotated[str, typer.Option(help="head dimensions, with spaces between  [default: all]")] = "",
    module: Annotated[
        str, typer.Option(help="modules that offer variants, with spaces between  [default: all in kernels/]")
    ] = "",
    output: Annotated[Path, typer.Option(help="folder whose results.jsonl the rows are added to")] = Path(
        "benchmarks/results/static"
    ),
) -> None:
    """Registers, spills, shared memory and instructions per element of every kernel, compiled without a GPU.

    Exit status 1: a budget is broken.
    """
    with telling_errors():
        filters = static_job.Filters(
            tuple(arch.split()),
            tuple(kernel.split()),
            tuple(codec.split()),
            whole_numbers(head_dim, "head dimensions"),
            tuple(module.split()),
        )
        within = static_job.run(filters, output)
    if not within:
        raise typer.Exit(1)


@app.command()
def gpu(
    minutes: Annotated[float, typer.Option(help="minutes that it may take")] = gpu_job.Settings.minutes,
    only: Annotated[
        str,
        typer.Option(
            help="parts of jobs' names, with semicolons between, any of which a job must have  [default: all]"
        ),
    ] = "",
    workers: Annotated[int, typer.Option(help="processes that check side by side")] = gpu_job.Settings.workers,
    dry: Annotated[bool, typer.Option("--dry", help="tiny shapes on the CPU, with TRITON_INTERPRET=1")] = False,
    commit: Annotated[str | None, typer.Option(help="what rows say of the code  [default: git's commit]")] = None,
    output: Annotated[
        Path | None, typer.Option(help="folder for DEVICE.jsonl  [default: benchmarks/results/gpu; --dry: none]")
    ] = None,
) -> None:
    """The kernels on a GPU: right, and how fast: decode, encode, prefill, and a model of 8 billion parameters.

    Exit status 1: a check failed.
    """
    with telling_errors():
        parts = tuple(part.strip() for part in only.split(";") if part.strip())
        settings = gpu_job.Settings(minutes, parts, workers, dry, commit)
        folder = output or (None if dry else Path("benchmarks/results/gpu"))
        rows = gpu_job.perform(settings, folder, Console())
    if any(row["status"] == "failed" and row["job"].startswith("check") for row in rows):
        raise typer.Exit(1)


app.command("compare")(compare_command.command)
app.command("guard")(guard_command.command)
app.command("latency")(latency_command.command)
app.command("lmeval")(lmeval_command.command)
app.command("memory")(memory_command.command)
app.command("million")(million_command.command)
app.command("offload")(offload_command.command)
app.command("parallel")(parallel_command.command)
app.command("prefix")(prefix_command.command)
app.command("report")(report_command.command)
app.command("retrieval")(retrieval_command.command)
app.command("scaling")(scaling_command.command)
app.command("soak")(soak_command.command)


if __name__ == "__main__":
    app()
