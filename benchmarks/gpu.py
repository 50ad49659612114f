"""The job `python -m benchmarks gpu`: the kernels checked and timed on a GPU, in one run of at most ten minutes.

What is worth most comes first, every row is saved as soon as it is there, and what does not fit into the time is a row
that says so. See `gpu_jobs` for the list, `gpu_checks`, `gpu_attention`, `gpu_encode` and `gpu_model` for what is
measured, `gpu_worker` for the processes that do it. `--dry` runs the same code in Triton's interpreter on the CPU.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import results
from benchmarks.gpu_rows import Known, Row
from benchmarks.gpu_worker import Job, in_children, out_of_time
from kvcompress.backends import VARIABLE

CHECKS = 0.4  # of the time that checks may take
PATIENCE = 150.0  # seconds that a job may say nothing, compiling for instance
SHOWN = (
    "error", "allowed", "distortion_ratio", "device_us", "kernel_us", "host_us", "step_us", "tokens_per_second",
    "bytes_per_second", "share_of_copy", "tflops", "share_of_prefill", "kernels_share_of_prefill",
    "speed_of_flash", "ratio", "kernel_ratio",
    "registers", "spills", "ratios",
)  # fmt: skip
#: What the kernels are to reach: section, name, field, bound (at least; where negative, at most its magnitude), for one
#: sequence; decoding from LONG tokens on.
TARGETS = (
    ("decode", "trellis3", "ratio", 2.5),
    ("decode", "spectral3", "ratio", 2.5),
    ("decode", "lloyd4", "ratio", 3.0),
    ("encode", "trellis3 64 pages", "share_of_prefill", -0.05),
    ("encode", "prerope+spectral3 64 pages", "share_of_prefill", -0.05),
    ("prefill", "trellis3", "speed_of_flash", 0.7),
    ("prefill", "prerope+spectral3", "speed_of_flash", 0.7),
)
LONG = 128 * 1024


@dataclass(frozen=True)
class Settings:
    """minutes: of the whole run. only: parts of jobs' names, any of which a job must have; none: all jobs. workers:
    processes that check side by side. commit: what rows say of the code; None: what git says.
    """

    minutes: float = 9.0
    only: tuple[str, ...] = ()
    workers: int = 12
    dry: bool = False
    commit: str | None = None

    def chosen(self) -> list[Job]:
        """The jobs to do; raises ValueError where there are none."""
        from benchmarks.gpu_jobs import table  # imports Triton, which is installed on Linux only

        jobs = [job for job, _ in table(self.dry).values()]
        found = [job for job in jobs if not self.only or any(part in job.name for part in self.only)]
        if not found:
            raise ValueError(f"no job's name holds any of {self.only}; they are: {'; '.join(j.name for j in jobs)}")
        return found


def perform(settings: Settings, output: Path | None, console: Console) -> list[Row]:
    """Do the jobs, print a line for each row, and keep the rows in `output`/DEVICE.jsonl (None: nowhere).

    Rows of jobs that an earlier run left there and this one does not do are kept. Raises ValueError where there is no
    GPU, or, for a dry run, no interpreter.
    """
    if settings.dry and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("--dry runs in Triton's interpreter: set TRITON_INTERPRET=1")
    os.environ[VARIABLE] = "triton"
    begun = time.monotonic()
    jobs = settings.chosen()
    shared = _shared(settings)
    path = None if output is None else output / f"{_slug(shared['device'])}.jsonl"
    rows = [] if path is None else _kept(path, {job.name for job in jobs})
    fresh: list[Row] = []
    for name, row in _rows(settings, jobs, begun + 60 * settings.minutes):
        parts = {"section": name.split()[0], "name": name}
        fresh.append({"job": name, **parts, **row, **shared})
        if path is not None:
            _save(path, [*rows, *fresh])
        console.print(
            f"{time.monotonic() - begun:5.0f}s {line(fresh[-1])}", markup=False, highlight=False, soft_wrap=True
        )
    for text in verdicts(fresh):
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if not settings.dry:
        console.print("the tests for a GPU: python -m pytest -m gpu tests", markup=False, highlight=False)
    return fresh


def _rows(settings: Settings, jobs: list[Job], until: float) -> Iterator[tuple[str, Row]]:
    """(job, row) of all jobs: checks side by side, the rest one after another."""
    from benchmarks.gpu_jobs import healthy, run

    known: Known = {}
    if settings.dry:
        for job in jobs:
            if time.monotonic() > until:
                yield job.name, out_of_time(job, until)
                continue
            for row in run(True, job.name, known):
                yield job.name, row
        return
    checks = [job for job in jobs if job.name.startswith("check")]
    rest = [job for job in jobs if not job.name.startswith("check")]
    start = time.monotonic()
    soon = start + CHECKS * (until - start) if rest else until
    work = partial(run, False)
    yield from in_children(work, healthy, checks, settings.workers, known, soon, PATIENCE)
    yield from in_children(work, healthy, rest, 1, known, until, PATIENCE)


def _shared(settings: Settings) -> dict[str, Any]:
    """What every row says of the device, the versions and the commit."""
    import torch

    if settings.dry:
        name = "dry"
    elif torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
    else:
        raise ValueError("there is no GPU here; --dry runs the same code on the CPU, in Triton's interpreter")
    shared = results.environment(name, torch.get_num_threads())
    shared["versions"]["triton"] = results.installed("triton")
    shared["versions"]["cuda"] = torch.version.cuda
    if settings.commit is not None:
        shared["commit"] = settings.commit
    return shared


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _kept(path: Path, jobs: set[str]) -> list[Row]:
    """The rows of a file that do not belong to these jobs."""
    if not path.exists():
        return []
    rows: list[Row] = [json.loads(text) for text in path.read_text("utf-8").splitlines()]
    return [row for row in rows if row["job"] not in jobs]


def _save(path: Path, rows: Iterable[Row]) -> None:
    """Write all rows, so that a run that is killed leaves a whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    beside.replace(path)


def line(row: Row) -> str:
    """A row in one line: what it is of, and the numbers that matter, or why there are none."""
    said = [row["section"], str(row["name"])]
    if "tokens" in row and row["section"] not in ("check",):
        said.append(f"{row.get('rows', 1)} x {row['tokens']}")
    if row["status"] != "ok":
        said.append(f"{row['status'].upper()}: {row['reason'][:200]}")
    said += [f"{name}={_short(row[name])}" for name in SHOWN if row.get(name) is not None]
    return "  ".join(said)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def verdicts(rows: list[Row]) -> Iterator[str]:
    """What came of the targets, and how many rows there are of each kind."""
    for section, name, field, bound in TARGETS:
        for row in rows:
            own = row["section"] == section and row["name"] == name and row.get("rows", 1) == 1
            if own and (section != "decode" or row.get("tokens", 0) >= LONG) and row.get(field) is not None:
                met = row[field] >= bound if bound > 0 else row[field] <= -bound
                wanted = f"at {'least' if bound > 0 else 'most'} {abs(bound)}"
                where = f" over {row['tokens']} tokens" if "tokens" in row else ""
                yield f"{'met' if met else 'MISSED'}: {section} {name}{where}: {field} {row[field]}, wanted {wanted}"
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["status"]] = counts.get(row["status"], 0) + 1
    yield "rows: " + ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
