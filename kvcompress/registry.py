"""Names for things: codecs here, backends later. An unknown name is answered with the known ones and the nearest."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """A mapping of name to object, filled by `register` and, on the first miss, by the entry points of `group`."""

    def __init__(self, kind: str, group: str):
        self.kind, self.group = kind, group
        self._items: dict[str, T] = {}
        self._searched = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: make the object known as `name`. Raises ValueError where the name is taken."""

        def add(item: T) -> T:
            if name in self._items:
                raise ValueError(f"{self.kind} {name!r} is registered already")
            self._items[name] = item
            return item

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            self._load_entry_points()
        if name not in self._items:
            near = difflib.get_close_matches(name, self._items, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown {self.kind} {name!r}{hint} Known: {', '.join(self)}")
        return self._items[name]

    def __contains__(self, name: str) -> bool:
        return name in self._items or name in list(self)

    def __iter__(self) -> Iterator[str]:
        self._load_entry_points()
        return iter(sorted(self._items))

    def _load_entry_points(self) -> None:
        """Import what other packages offer under `group`; each one's module registers its own items."""
        if not self._searched:
            self._searched = True
            for point in entry_points(group=self.group):
                point.load()


@dataclass(frozen=True)
class Family:
    """A family of codecs.

    build: a function of (CodecSpec, Geometry) that returns the codec. bits: the numbers that the family takes, empty
    where it has no such choice. parts: how many codecs it may be given to work on. examples: specs, as strings, that
    stand for the family in lists and in the contract tests.
    """

    build: Callable[[Any, Any], Any]
    bits: Sequence[float]
    parts: Sequence[int]
    examples: Sequence[str]

    def check(self, name: str, bits: float | None, parts: int) -> None:
        """Raises ValueError for a number or a count of parts that the family does not take."""
        if bits is None and self.bits:
            raise ValueError(f"codec {name!r} needs a number: {_listed(self.bits, name)}")
        if bits is not None and (isinstance(bits, bool) or bits not in self.bits):
            accepted = _listed(self.bits) if self.bits else "no number"
            raise ValueError(f"codec {name!r} takes {accepted}, got {bits!r}")
        if parts not in self.parts:
            counts = " or ".join(map(str, self.parts)) if len(self.parts) < 5 else f"{min(self.parts)} or more"
            raise ValueError(f"codec {name!r} works on {counts} other codecs (written {name}+CODEC), got {parts}")


def _listed(numbers: Sequence[float], prefix: str = "") -> str:
    if isinstance(numbers, range):
        return f"{prefix}{numbers[0]} to {prefix}{numbers[-1]}"
    return ", ".join(f"{prefix}{number}" for number in numbers)
