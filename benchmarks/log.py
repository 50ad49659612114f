"""Files of results that grow row by row: one JSON object a line, so that a killed run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from benchmarks import results


class LoggedRow(Protocol):
    """A frozen dataclass of plain values. status: "ok", else why there is no more to say of it."""

    @property
    def status(self) -> str: ...

    @property
    def key(self) -> Hashable:
        """What tells it from the other rows of its file."""
        ...


R = TypeVar("R", bound=LoggedRow)


class Log(Generic[R]):
    """A file of JSON lines, a row and what all rows share in each, that can be gone on with.

    kind: the rows' dataclass. settings: what every row depends on beside its key. Raises ValueError where the file
    holds rows of other settings.
    """

    def __init__(
        self,
        path: Path,
        kind: type[R],
        settings: Mapping[str, Any],
        shared: Mapping[str, Any],
        fresh: bool = False,
    ):
        self.path, self.kind = path, kind
        self._names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
        self.shared = {**shared, "settings": json.loads(json.dumps(dict(settings)))}  # as they are read back: no tuples
        self._lines: dict[Hashable, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if not fresh and path.exists():
            for line in readable(path.read_text("utf-8").splitlines()):
                self._check(line)
                self._lines[self._row(line).key] = line
        self.rewrite()

    def _check(self, line: Mapping[str, Any]) -> None:
        mine, theirs = self.shared["settings"], line.get("settings", {})
        apart = [name for name in mine if theirs.get(name) != mine[name]]
        if apart:
            said = ", ".join(f"{name} {theirs.get(name)!r}, not {mine[name]!r}" for name in apart)
            raise ValueError(f"{self.path} holds rows with {said}: choose another --output, or --fresh to replace them")

    def _row(self, line: Mapping[str, Any]) -> R:
        return self.kind(**{name: value for name, value in line.items() if name in self._names})

    def rewrite(self) -> None:
        """Write the file anew: every row once."""
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text("".join(json.dumps(line) + "\n" for line in self._lines.values()))
        fresh.replace(self.path)

    def add(self, row: R) -> None:
        """Append a row, in place of one with the same key."""
        line = {**asdict(row), **self.shared}  # type: ignore[call-overload]
        self._lines[row.key] = line
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def done(self, key: Hashable) -> bool:
        """Whether the row was measured already; one that failed was not."""
        return key in self._lines and self._lines[key]["status"] == "ok"

    @property
    def rows(self) -> list[R]:
        return [self._row(line) for line in self._lines.values()]

    @property
    def commits(self) -> list[str]:
        """The commits that the rows were measured at."""
        return sorted({str(line.get("commit")) for line in self._lines.values()})


def open_log(
    folder: Path, benchmark: str, kind: type[R], settings: Mapping[str, Any], fresh: bool = False, **more: Any
) -> Log[R]:
    """The log `results.jsonl` of a folder, whose lines say which benchmark they are of, versions, machine and commit.

    more: what else all lines are to say, and may differ from run to run.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shared = {"benchmark": benchmark, **more, **results.environment(device, torch.get_num_threads())}
    return Log(folder / "results.jsonl", kind, settings, shared, fresh)


def read(path: Path, kind: type[R]) -> list[R]:
    """The rows of a file of results, the last one of each key; raises OSError where there is no such file."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    lines = readable(path.read_text("utf-8").splitlines())
    rows = [kind(**{name: value for name, value in line.items() if name in names}) for line in lines]
    return list({row.key: row for row in rows}.values())


def readable(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The lines' objects, without one that a killed run left unfinished."""
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
