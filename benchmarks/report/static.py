"""What the kernels cost as compiled, from `python -m benchmarks static`: machine code alone, no GPU."""

from __future__ import annotations

from benchmarks.report.parts import Part, Table
from benchmarks.report.sources import Source
from benchmarks.static import Row, number
from benchmarks.tables import markdown

ABOUT = """The kernels compiled for chips that need not be at hand. A chip issues a fixed number of instructions in the
time in which it reads an element's 3 bits, so instructions per cached element say whether attention on codes is bound
by arithmetic or by memory. A spill is a register that had to go to memory."""

DECODE = "decode"  # the kernel that the headline tells of


def part(source: Source) -> Part:
    rows = source.rows(Row)
    over = [row for row in rows if row.over_budget]
    decode = [row for row in rows if row.kernel == DECODE and row.lane_instructions_per_element]
    headline = f"{len(rows)} variants of kernels were compiled, {len(over)} of them break a budget."
    if decode:
        least, most = (pick(decode, key=lambda row: row.lane_instructions_per_element or 0.0) for pick in (min, max))
        headline += (
            f" Decoding takes {number(least.lane_instructions_per_element)} ({least.codec}, {least.arch}) to "
            f"{number(most.lane_instructions_per_element)} ({most.codec}, {most.arch}) lane-instructions an element."
        )
    headings = ["kernel", "codec", "chip", "head size", "variant", "registers", "spills", "lane-instr./elem", "budget"]
    caption = "Registers, spills and instructions in the main loop"
    tables = (
        Table(f"{caption}: {DECODE}", markdown(headings, 5, [_line(row) for row in decode])),
        Table(f"{caption}: all kernels", markdown(headings, 5, [_line(row) for row in rows]), folded=True),
    )
    remarks = tuple(f"{row.kernel} {row.codec}, {row.arch}: {row.reason}" for row in rows if row.status != "ok")
    return Part(headline, (), (), tables if decode else tables[1:], remarks)


def _line(row: Row) -> list[str]:
    numbers = ("-" if value is None else str(value) for value in (row.registers, row.spills))
    lanes = number(row.lane_instructions_per_element) or "-"
    place = [row.kernel, row.codec, row.arch, str(row.head_dim), str(row.variant)]
    return [*place, *numbers, lanes, "; ".join(row.over_budget) or "kept"]
