"""Processes that measure: one that dies, hangs or loses its device takes only its own job with it.

A kernel that reads where nothing is leaves its process without a device for good, so the process that keeps the results
never touches one. Children are spawned, do one named job after another, and send each row as soon as it is there.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

LOST = 3  # exit status of a process that cannot go on
Row = dict[str, Any]  # those of gpu_rows, which a process that does something else has no use for
Known = dict[str, Any]
Run = Callable[[str, Known], Iterator[Row]]


@dataclass(frozen=True)
class Job:
    """name: by which `Run` knows it. seconds: that it takes, as a guess: it is not begun where fewer are left."""

    name: str
    seconds: float


@dataclass
class _Child:
    process: BaseProcess
    pipe: Connection
    job: str = ""
    heard: float = field(default_factory=time.monotonic)

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


def serve(pipe: Connection, run: Run, healthy: Callable[[], bool]) -> None:
    """What a child does: jobs as they come, until there are no more."""
    while True:
        try:
            name, known = pipe.recv()
        except EOFError:
            return
        for row in run(name, known):
            pipe.send(row)
            if row["status"] == "failed" and not healthy():
                pipe.close()
                os._exit(LOST)
        pipe.send(known)


def in_children(
    run: Run, healthy: Callable[[], bool], jobs: Sequence[Job], count: int, known: Known, until: float, patience: float
) -> Iterator[tuple[str, Row]]:
    """(job, row) of all jobs, by up to `count` processes at a time; what they learn is added to `known`.

    run, healthy: functions of a module. until: on the clock of time.monotonic; what is not done by then is left out.
    patience: seconds that a job may say nothing.
    """
    context = multiprocessing.get_context("spawn")
    waiting = deque(jobs)
    idle: list[_Child] = []
    busy: dict[Connection, _Child] = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < count:
                job = waiting.popleft()
                if time.monotonic() + job.seconds > until:
                    yield job.name, out_of_time(job, until)
                    continue
                if not idle:
                    ours, theirs = context.Pipe()
                    process = context.Process(target=serve, args=(theirs, run, healthy), daemon=True)
                    process.start()
                    theirs.close()
                    idle.append(_Child(process, ours))
                child = idle.pop()
                child.job, child.heard = job.name, time.monotonic()
                child.pipe.send((job.name, known))
                busy[child.pipe] = child
            ready = wait(list(busy), timeout=0.5)
            for pipe in [pipe for pipe in busy if pipe in ready]:
                child = busy[pipe]
                child.heard = time.monotonic()
                try:
                    answer = child.pipe.recv()
                except (EOFError, OSError):
                    del busy[pipe]
                    child.process.join(timeout=10)  # it has let go of the pipe and is about to say why
                    child.end()
                    yield child.job, _failed(f"the process ended with status {child.process.exitcode}")
                    continue
                if "status" in answer:
                    yield child.job, answer
                else:
                    known.update(answer)
                    idle.append(busy.pop(pipe))
            now = time.monotonic()
            for pipe, child in list(busy.items()):
                if now > until or now - child.heard > patience:
                    del busy[pipe]
                    child.end()
                    late = "the time is up" if now > until else f"no answer for {patience:.0f} seconds"
                    yield child.job, _failed(late)
    finally:
        for child in [*idle, *busy.values()]:
            child.end()


def _failed(reason: str) -> Row:
    return {"status": "failed", "reason": reason}


def out_of_time(job: Job, until: float) -> Row:
    """The row of a job that was not begun."""
    left = max(until - time.monotonic(), 0)
    return {"status": "skipped", "reason": f"takes about {job.seconds:.0f} seconds, {left:.0f} are left"}
