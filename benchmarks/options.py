"""What the commands' options hold, read from text."""

from __future__ import annotations


def whole_numbers(text: str, what: str) -> tuple[int, ...]:
    """The numbers of an option; raises ValueError where it holds anything else."""
    if not all(word.isdecimal() for word in text.split()):
        raise ValueError(f"{what} must be whole numbers with spaces between, got {text!r}")
    return tuple(map(int, text.split()))
