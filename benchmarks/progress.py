"""The progress bar of long jobs."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def bar(console: Console, width: int) -> Progress:
    """What is under way, in `width` characters, how far it is, and the time it has taken and will take."""
    text = TextColumn(f"{{task.description:{width}}}")
    return Progress(
        text, BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn(), console=console
    )
