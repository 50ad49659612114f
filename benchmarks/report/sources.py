"""Files of results, read: the lines of each benchmark in each file, and what could not be read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

from benchmarks import guard, measurements
from benchmarks.log import LoggedRow, readable
from kvcompress.spec import DEFAULT_SPEC

Line = Mapping[str, Any]
R = TypeVar("R", bound=LoggedRow)


class CacheRow(Protocol):
    """A row of one cache, under its name or spec."""

    @property
    def cache(self) -> str: ...


C = TypeVar("C", bound=CacheRow)

#: What benchmarks/embedded/report.py writes: one JSON object, which does not say what it is of.
EMBEDDED = {"book", "bits_per_byte", "recall"}


@dataclass(frozen=True)
class Source:
    """The lines of one benchmark in one file."""

    path: Path
    benchmark: str
    lines: tuple[Line, ...]

    def rows(self, kind: type[R]) -> list[R]:
        """The lines as rows of a dataclass, the last one of each key; raises ValueError where they are none."""
        names = {field.name for field in fields(kind)}  # type: ignore[arg-type]  # rows are dataclasses, as LoggedRow says
        try:
            rows = [kind(**{name: value for name, value in line.items() if name in names}) for line in self.lines]
        except TypeError as error:
            raise ValueError(f"{self.path}: its lines are no rows of {self.benchmark}: {error}") from error
        return list({row.key: row for row in rows}.values())

    def settings(self, name: str) -> Any:
        """A setting of the last line; None where the lines do not say."""
        return (self.lines[-1].get("settings") or {}).get(name)

    @property
    def subject(self) -> str:
        """The model and, where the lines name one, the text; for a heading."""
        model, text = self.settings("model"), self.settings("text")
        told = "the embedded model" if model is None else Path(str(model)).name
        return told if text is None else f"{told} on {Path(str(text)).name}"


def preferred(rows: Sequence[C]) -> C:
    """The row of the default spec, or else the first one, for a sentence that tells of one cache."""
    return next((row for row in rows if row.cache == DEFAULT_SPEC), rows[0])


def gather(paths: Sequence[Path]) -> tuple[list[Source], list[str]]:
    """What the files, and the folders with all that lies below, hold; and remarks on what is left out.

    A folder's own regression baseline (`benchmarks.guard`) is left out unless it is named itself. Raises OSError for a
    path that is not there, ValueError where nothing holds results.
    """
    remarks: list[str] = []
    found: list[Source] = []
    for path in dict.fromkeys(path.resolve() for path in paths):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder of results")
        for file in _files(path):
            if guard.FOLDER.resolve() in file.parents and path not in (file, guard.FOLDER.resolve()):
                remarks.append(f"{file.name} of {file.parent.name}: left out, a baseline for regressions, no result")
            else:
                found += _read(file, remarks)
    if not found:
        raise ValueError(f"no results of any benchmark in {', '.join(map(str, paths))}")
    return found, remarks


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*.json*") if file.suffix in (".json", ".jsonl"))


def _read(file: Path, remarks: list[str]) -> list[Source]:
    text = file.read_text("utf-8")
    if file.suffix == ".json":
        content = json.loads(text)
        if isinstance(content, dict) and content.keys() >= EMBEDDED:
            return [Source(file, "embedded", (content,))]
        return []  # what a benchmark writes beside its rows
    lines: dict[str, list[Line]] = {}
    strange = 0
    for line in readable(text.splitlines()):
        name = measurements.benchmark(line) if isinstance(line, dict) else None
        if name is None:
            strange += 1
        else:
            lines.setdefault(name, []).append(line)
    if strange:
        remarks.append(f"{file}: {strange} lines are of no benchmark that is known here")
    return [Source(file, name, tuple(own)) for name, own in lines.items()]


def by_benchmark(sources: Iterable[Source]) -> dict[str, list[Source]]:
    """The sources of each benchmark."""
    found: dict[str, list[Source]] = {}
    for source in sources:
        found.setdefault(source.benchmark, []).append(source)
    return found
