"""table.md of `python -m benchmarks retrieval`: the share of answers found, by cache and length, a table for a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.caches import REFERENCE, UNCOMPRESSED
from benchmarks.frontier_tables import markdown
from benchmarks.haystack import TASKS
from benchmarks.retrieval_rows import Row

#: Where the uncompressed model finds less than this, what a compressed cache finds says nothing.
PASS = 0.5

NOTES = """Facts are put into a long text, and asked for at its end; a question counts when the greedy answer is right
word for word (of a list, each item counts, given those before it). The text goes through the cache in chunks; a gap of
plain text keeps everything that is asked for out of the exact recent window. *bits/elem*: bits of coded storage,
overheads included, for each coded element, at the longest length."""


@dataclass(frozen=True)
class Cell:
    """What a cache found of a task at a length: over all documents, weighed by their questions."""

    recall: float
    questions: int
    bits: float | None


def cell(rows: Sequence[Row]) -> Cell | None:
    """Of rows of one cache; None where nothing was measured."""
    own = [(row.recall, row.questions) for row in rows if row.recall is not None and row.questions is not None]
    questions = sum(count for _, count in own)
    bits = [row.bits_per_element for row in rows if row.bits_per_element is not None]
    if not questions:
        return None
    found = sum(recall * count for recall, count in own) / questions
    return Cell(found, questions, sum(bits) / len(bits) if bits else None)


def cells(rows: Sequence[Row]) -> dict[tuple[str, str, int], Cell]:
    """By task, cache and length."""
    keys = dict.fromkeys((row.task, row.cache, row.tokens) for row in rows)
    found = {key: cell([row for row in rows if (row.task, row.cache, row.tokens) == key]) for key in keys}
    return {key: each for key, each in found.items() if each is not None}


def ordered(rows: Sequence[Row]) -> list[str]:
    """The names of all caches, the uncompressed one first, then by bits, most first."""
    bits: dict[str, float] = {}
    for row in rows:
        rank = float("inf") if row.side == REFERENCE else row.bits_per_element or 0.0
        bits[row.cache] = max(bits.get(row.cache, 0.0), rank)
    return sorted(bits, key=lambda name: -bits[name])


def document(rows: Sequence[Row], title: str, remarks: Sequence[str] = ()) -> str:
    """The whole of table.md."""
    parts = [f"# Retrieval: {title}", NOTES]
    for task in TASKS:
        own = [row for row in rows if row.task == task]
        if own:
            parts += [f"## {task}: {TASKS[task].say}", *table(own)]
    parts += [*not_measured(rows), *remarks]
    return "\n\n".join(parts) + "\n"


def table(rows: Sequence[Row]) -> list[str]:
    """The table of a task, and what has to be said of it."""
    found, lengths = cells(rows), sorted({row.tokens for row in rows})
    task = rows[0].task
    weak = [length for length in lengths if not passed(found.get((task, UNCOMPRESSED.name, length)))]
    lines = []
    for name in ordered(rows):
        own = [found.get((task, name, length)) for length in lengths]
        bits = next((f"{each.bits:.2f}" for each in reversed(own) if each is not None and each.bits), "-")
        marks = [told(each, name, length in weak) for length, each in zip(lengths, own, strict=True)]
        lines.append([name, bits, *marks])
    counts = [max((each.questions for key, each in found.items() if key[2] == length), default=0) for length in lengths]
    heading = [f"{length} tokens, {count} questions" for length, count in zip(lengths, counts, strict=True)]
    parts = [markdown(["cache", "bits/elem", *heading], lines)]
    if weak:
        parts.append(
            f"In parentheses, at {', '.join(map(str, weak))} tokens: the uncompressed model itself finds less than "
            f"{PASS:.0%}, or was not measured, so what the caches find there says nothing about them."
        )
    if "†" in parts[0]:
        parts.append("†: nothing was coded, the text is too short for this cache to begin.")
    return parts


def passed(base: Cell | None) -> bool:
    """Whether what the uncompressed model found is enough to compare with."""
    return base is not None and base.recall >= PASS


def told(found: Cell | None, cache: str, weak: bool) -> str:
    """A cell as text: the recall, a mark where nothing was coded, parentheses where the model itself is too weak."""
    if found is None:
        return "-"
    said = f"{found.recall:.0%}" + (" †" if found.bits is None and cache != UNCOMPRESSED.name else "")
    return f"({said})" if weak else said


def not_measured(rows: Sequence[Row]) -> list[str]:
    """One paragraph for each reason for which caches were not measured, with the tasks and lengths that it struck."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.status != "ok":
            reasons.setdefault((row.cache, row.status, row.reason or ""), []).append(f"{row.task} {row.tokens}")
    return [
        f"{cache}: {status} ({', '.join(dict.fromkeys(where))}): {reason}"
        for (cache, status, reason), where in reasons.items()
    ]
