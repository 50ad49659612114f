"""The page as HTML and as Markdown, from the same sections: only the pictures are in the one alone."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from benchmarks.report.parts import Part, Section, Table

TITLE = "Compressed KV caches, measured"
TEMPLATE = "page.html.j2"


def html(sections: Sequence[Section], summary: Sequence[str]) -> str:
    """The page; summary: sentences in Markdown for its top."""
    loader = FileSystemLoader(Path(__file__).parent)
    templates = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters |= {"text": _text, "line": _line, "svg": Markup}
    return templates.get_template(TEMPLATE).render(title=TITLE, sections=sections, summary=summary)


def _parser() -> MarkdownIt:
    """Plain Markdown with tables, each in a box of its own; markup in the text is not let through."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("table_open", lambda *_: '<div class="scroll" tabindex="0"><table>')
    parser.add_render_rule("table_close", lambda *_: "</table></div>")
    return parser


_MARKDOWN = _parser()


#: 1.2e-03, as Python writes it.
_POWER = re.compile(r"(?<![\w.])(\d(?:\.\d+)?)e([+-])0*(\d+)(?!\w)")
_SMALL = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def powers(text: str) -> str:
    """Numbers with an exponent as people write them: 1.2e-03 as 1.2×10⁻³, 5e+00 as 5."""

    def written(match: re.Match[str]) -> str:
        exponent = match[2].replace("+", "") + match[3]
        return match[1] if match[3] == "0" else f"{match[1]}×10{exponent.translate(_SMALL)}"

    return _POWER.sub(written, text)


def _text(text: str) -> Markup:
    return Markup(_MARKDOWN.render(powers(text)))


def _line(text: str) -> Markup:
    """Text within a paragraph."""
    return Markup(_MARKDOWN.renderInline(powers(" ".join(text.split()))))


def markdown(sections: Sequence[Section], summary: Sequence[str]) -> str:
    """The same as text."""
    numbers = itertools.count(1)
    blocks = [f"# {TITLE}", _listed(summary)]
    for section in sections:
        blocks += [f"## {section.title}", section.about]
        for part in section.parts:
            blocks += [f"### {part.subject}"] if part.subject and len(section.parts) > 1 else []
            blocks += _part(part, numbers)
    return "\n\n".join(block.strip() for block in blocks if block) + "\n"


def _part(part: Part, numbers: itertools.count[int]) -> list[str]:
    found = [each for each in (part.headline, *part.found) if each]
    blocks = [_listed(found)]
    for table in part.tables:
        blocks.append(_table(table, next(numbers)))
    return [*blocks, _listed(part.remarks)]


def _table(table: Table, number: int) -> str:
    return "\n\n".join(
        text.strip() for text in (f"**Table {number}.** {table.caption}", table.markdown, table.note) if text
    )


def _listed(lines: Sequence[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)
