"""Rows of any benchmark's results, each with what tells it from the others, so that two runs can be matched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.log import readable

Line = Mapping[str, Any]

#: What names a measurement, in the order in which it is told.
IDENTITY = (
    "job", "section", "name", "subject", "geometry", "task", "kernel", "codec", "arch", "head_dim", "variant",
    "context", "tokens", "bits", "batch", "rows", "depth", "restart", "chunk", "basis", "budget", "ranks",
)  # fmt: skip

#: Settings that say how much was measured or for how long, and not what a number means.
NO_MATTER = {"baselines", "repetitions", "steps", "minutes", "workers", "resume", "budget", "seed"}

#: The benchmarks whose lines do not say which they are of, by fields that only they have.
UNNAMED = {
    "gpu": {"job", "section", "name"},
}

#: Benchmarks that measure nothing: their rows follow from other benchmarks', and are not read.
DERIVED = ("scaling",)

#: States of a row that say nothing of the code: there was nothing to measure.
ABSENT = ("not installed", "not known", "skipped")


@dataclass(frozen=True)
class Identity:
    """benchmark; settings: name and value of those that a number depends on; fields: of IDENTITY, with their values."""

    benchmark: str
    settings: tuple[tuple[str, str], ...]
    fields: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return " ".join([self.benchmark, *(f"{name}={value}" for name, value in self.fields)])


@dataclass(frozen=True)
class Measurement:
    """All rows of one identity, by seed."""

    identity: Identity
    by_seed: Mapping[int, Line]


def read(path: Path) -> dict[Identity, Measurement]:
    """The measurements of a file of JSON lines, or of all .jsonl files in a folder and below.

    Raises OSError where there is none, ValueError where there are no rows, a line does not say what it is of, or two
    lines are of the same measurement.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder of results")
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    found: dict[Identity, dict[int, Line]] = {}
    for file in files:
        for line in readable(file.read_text("utf-8").splitlines()):
            if benchmark(line) in DERIVED:
                continue
            name, seed = identity(line, file), seed_of(line)
            before = found.setdefault(name, {}).get(seed)
            if before is not None and state(before)[0] == "ok":  # one that failed may have been taken anew
                raise ValueError(f"{file}: a second row of {name}, seed {seed}: what tells the two apart is not known")
            found[name][seed] = line
    if not found:
        where = ", ".join(map(str, files)) or "any .jsonl"
        raise ValueError(f"{path} holds no measurements: no line of JSON in {where}, or only of {', '.join(DERIVED)}")
    return {name: Measurement(name, lines) for name, lines in found.items()}


def benchmark(line: Any) -> str | None:
    """Which benchmark a line of JSON is of, None where that cannot be told."""
    if not isinstance(line, Mapping):
        return None
    if "benchmark" in line:
        return str(line["benchmark"])
    return next((name for name, fields in UNNAMED.items() if fields <= line.keys()), None)


def identity(line: Line, file: Path) -> Identity:
    """What a line is a measurement of; raises ValueError where it does not say."""
    name = benchmark(line)
    if name is None:
        raise ValueError(f"{file}: not a result of any benchmark here: {json.dumps(line)[:100]}")
    settings = {
        setting: plain(setting, value)
        for setting, value in (line.get("settings") or {}).items()
        if setting not in NO_MATTER and not isinstance(value, (list, dict))  # a list is what rows range over
    }
    told = ((field, line.get(field)) for field in named_by(line, name))
    return Identity(
        name,
        tuple(sorted(settings.items())),
        tuple((field, plain(field, value)) for field, value in told if value is not None),
    )


def named_by(line: Line, benchmark: str) -> list[str]:
    """The fields that a line's identity is made of.

    A spec as JSON is what the cache's name stands for, so it counts where there is no such name. Options are launch
    options in `gpu`, those of the whole run elsewhere.
    """
    cache = "cache" if isinstance(line.get("cache"), str) else "spec"
    own = ["programs", "options"] if benchmark == "gpu" else []
    return [*IDENTITY, *own, cache]


def plain(name: str, value: Any) -> str:
    """A value as text; of a file only its name, which does not change with the machine."""
    if name in ("text", "model") and isinstance(value, str):
        return Path(value).name
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def seed_of(line: Line) -> int:
    """The row's seed, else that of its settings, else 0: the benchmark draws nothing."""
    return int(line.get("seed", (line.get("settings") or {}).get("seed", 0)))


def state(line: Line) -> tuple[str, str]:
    """ "ok", or what else became of a row, and why."""
    if line.get("over_budget"):  # of `static`, where what does not compile is over budget too
        return "over budget", "; ".join(line["over_budget"])
    return str(line.get("status", "ok")), str(line.get("reason") or "")
