"""Rows of `python -m benchmarks gpu`: what was measured, refused, left out or failed, each a flat JSON object."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

#: section, name, status ("ok", "refused", "skipped", "failed"), `reason` unless ok, seconds; then what was measured.
Row = dict[str, Any]
#: What earlier jobs measured and later ones compare with, by name.
Known = dict[str, Any]


class RefusedError(Exception):
    """The kernels do not take this; with their reason."""

    status = "refused"


class SkippedError(Exception):
    """There is no room for this, or nothing to measure."""

    status = "skipped"


@dataclass(frozen=True)
class Setup:
    """Where to measure, and on what: rows of KV heads with `groups` query heads each, of head_dim dimensions."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    groups: int
    head_dim: int

    @property
    def dry(self) -> bool:
        return self.device.type == "cpu"

    @property
    def scaling(self) -> float:
        return float(self.head_dim**-0.5)


#: Llama 3.1 8B; and the smallest there is, for Triton's interpreter, which has no bfloat16.
GPU = Setup(torch.device("cuda", 0), torch.bfloat16, 8, 4, 128)
DRY = Setup(torch.device("cpu"), torch.float16, 1, 2, 32)

LINES, CHARACTERS = 14, 300  # of a traceback, and of each of its lines


def attempt(about: Row, measure: Callable[[], Row]) -> Row:
    """The row of a measurement, or what kept it from being made."""
    begun = time.perf_counter()
    try:
        row = {**about, "status": "ok", **measure()}
    except (RefusedError, SkippedError) as error:
        row = {**about, "status": error.status, "reason": str(error)}
    except Exception as error:
        row = {**about, **failure(error)}
    return {**row, "seconds": round(time.perf_counter() - begun, 2)}


def failure(error: Exception) -> Row:
    """An exception as a row has it: its message and the end of its traceback."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    message = " ".join(str(error).split())
    return {
        "status": "failed",
        "reason": f"{type(error).__name__}: {message[:CHARACTERS]}",
        "traceback": [line[:CHARACTERS] for line in lines[-LINES:]],
    }


def ratio(first: float | None, second: float | None) -> float | None:
    """first / second, rounded; None where either is not known."""
    return None if not first or not second else round(first / second, 3)
