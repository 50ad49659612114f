"""Names for things: codecs here, backends later. An unknown name is answered with the known ones and the nearest."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

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
