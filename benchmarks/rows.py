"""The rows of `python -m benchmarks quality`: one a subject, context, seed and cache, and the file that they go to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.caches import Contender

Key = tuple[str, int, int, str]


@dataclass(frozen=True)
class Row:
    """What was measured; None where it was not. status: "ok", else why there is no more, with a `reason`.

    bits_per_element: of the coded part, overheads included, None where nothing was coded; effective: of all that is
    held. bytes: of the cache after one document. KL in nats a token. Recall: shares of questions answered word for
    word. greedy_tokens: before the first that differs from the uncompressed model's, mean over documents.
    output_error: squared error of attention's output over its squared size. seconds: of the whole measurement.
    """

    subject: str
    context: int
    seed: int
    cache: str
    side: str
    family: str
    library: str
    spec: dict[str, Any] | None = None
    status: str = "ok"
    reason: str | None = None
    bits_per_element: float | None = None
    effective_bits_per_element: float | None = None
    bytes: int | None = None
    uncompressed_bytes: int | None = None
    perplexity: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None
    scored_positions: int | None = None
    needle_recall: float | None = None
    needle_questions: int | None = None
    key_recall: float | None = None
    key_questions: int | None = None
    greedy_tokens: float | None = None
    output_error: float | None = None
    seconds: float | None = None

    @property
    def key(self) -> Key:
        return self.subject, self.context, self.seed, self.cache


def empty_row(subject: str, context: int, seed: int, contender: Contender) -> Row:
    """The row of a cache that is not measured yet."""
    return Row(
        subject,
        context,
        seed,
        contender.name,
        contender.side,
        contender.family or contender.name,
        contender.library,
        contender.content,
    )


class Log:
    """A file of JSON lines, a row and what all rows share in each, that grows row by row and can be gone on with.

    settings: what every row depends on. Raises ValueError where the file holds rows of other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], shared: Mapping[str, Any], fresh: bool = False):
        self.path, self.shared = path, {**shared, "settings": dict(settings)}
        self._lines: dict[Key, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if not fresh and path.exists():
            for line in _readable(path.read_text("utf-8").splitlines()):
                self._check(line)
                self._lines[_row(line).key] = line
        self.rewrite()

    def _check(self, line: Mapping[str, Any]) -> None:
        mine, theirs = self.shared["settings"], line.get("settings", {})
        apart = [name for name in mine if theirs.get(name) != mine[name]]
        if apart:
            said = ", ".join(f"{name} {theirs.get(name)!r}, not {mine[name]!r}" for name in apart)
            raise ValueError(f"{self.path} holds rows with {said}: choose another --output, or --fresh to replace them")

    def rewrite(self) -> None:
        """Write the file anew: every row once."""
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text("".join(json.dumps(line) + "\n" for line in self._lines.values()))
        fresh.replace(self.path)

    def add(self, row: Row) -> None:
        """Append a row, in place of one with the same key."""
        line = {**asdict(row), **self.shared}
        self._lines[row.key] = line
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def done(self, key: Key) -> bool:
        """Whether the row was measured already; one that failed was not."""
        return key in self._lines and self._lines[key]["status"] == "ok"

    @property
    def rows(self) -> list[Row]:
        return [_row(line) for line in self._lines.values()]

    @property
    def commits(self) -> list[str]:
        """The commits that the rows were measured at."""
        return sorted({str(line.get("commit")) for line in self._lines.values()})


def _readable(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The lines' objects, without one that a killed run left unfinished."""
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def _row(line: Mapping[str, Any]) -> Row:
    return Row(**{field.name: line[field.name] for field in fields(Row) if field.name in line})
