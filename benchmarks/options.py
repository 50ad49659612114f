"""What the commands' options hold, read from text, and how the commands say that something of it was wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console


@contextmanager
def telling_errors() -> Iterator[None]:
    """End the command with status 2 and one line on standard error where a ValueError or OSError is raised within."""
    try:
        yield
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"Error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error


def whole_numbers(text: str, what: str) -> tuple[int, ...]:
    """The numbers of an option; raises ValueError where it holds anything else."""
    if not all(word.isdecimal() for word in text.split()):
        raise ValueError(f"{what} must be whole numbers with spaces between, got {text!r}")
    return tuple(map(int, text.split()))
