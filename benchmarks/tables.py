"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(headings: Sequence[str], right: int, rows: Sequence[Sequence[str]]) -> str:
    """A table whose last `right` columns are aligned to the right."""
    rules = ["---"] * (len(headings) - right) + ["---:"] * right
    return "".join(f"| {' | '.join(line)} |\n" for line in [headings, rules, *rows])
