"""What the page is made of. Texts are Markdown, pictures SVG; numbers of figures and tables are given by the page."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """One picture of a figure, with a heading of its own ("" for none)."""

    title: str
    svg: str


@dataclass(frozen=True)
class Figure:
    """Panels side by side under one caption. legend: (name, picture of its line and marker) of what they share.

    small: panels of which four stand side by side.
    """

    caption: str
    panels: tuple[Panel, ...]
    legend: tuple[tuple[str, str], ...] = ()
    small: bool = False


@dataclass(frozen=True)
class Table:
    """A table in Markdown. folded: long, so that the page shows it on request only. note: what its columns mean."""

    caption: str
    markdown: str
    folded: bool = False
    note: str = ""


@dataclass(frozen=True)
class Part:
    """What one file of results has to show.

    headline: one or two sentences for the top of the page, "" for none. found: sentences beside them. remarks: what is
    missing or has to be known.
    """

    headline: str
    found: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    remarks: tuple[str, ...] = ()
    subject: str = ""


@dataclass(frozen=True)
class Section:
    """All parts of one benchmark. about: what it shows and how to read it."""

    title: str
    about: str
    parts: tuple[Part, ...]

    @property
    def anchor(self) -> str:
        """What links name it by: what hosts of Markdown make of its title."""
        return re.sub(r"[^\w-]", "", self.title.lower().replace(" ", "-"))
