"""Parts of other packages that they do not promise to keep, looked up before anything is built on them."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

#: By module: names, and the parameters that are given to them.
Names = dict[str, dict[str, tuple[str, ...]]]


def missing(names: Names) -> list[str]:
    """What is not where it was, as MODULE.NAME or MODULE.NAME(PARAMETER=)."""
    return [what for module, wanted in names.items() for what in _missing(module, wanted)]


def _missing(module: str, names: dict[str, tuple[str, ...]]) -> list[str]:
    try:
        holder = importlib.import_module(module)
    except ImportError as error:
        return [f"{module} ({error})"]
    lacking = []
    for name, parameters in names.items():
        found: Any = holder
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is None:
            lacking.append(f"{module}.{name}")
        elif parameters:
            taken = inspect.signature(found).parameters
            lacking += [f"{module}.{name}({wanted}=)" for wanted in parameters if wanted not in taken]
    return lacking
