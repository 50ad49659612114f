"""Options that many commands have, how texts of others are read, and how commands say that something was wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console

Model = Annotated[str | None, typer.Option(help="model folder or hub id  [default: the embedded model]")]
LoadIn4Bit = Annotated[bool, typer.Option("--load-in-4bit", help="weights in bitsandbytes' NF4")]
Resume = Annotated[bool, typer.Option("--resume/--fresh", help="go on with the rows that the folder holds")]


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


def at_least(settings: object, **bounds: int) -> None:
    """Raise ValueError where a field of settings lies below its bound; None, what is not given, lies below none."""
    for name, least in bounds.items():
        value = getattr(settings, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
