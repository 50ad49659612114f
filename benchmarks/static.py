"""`python -m benchmarks static`: what every kernel costs on chips that are not at hand, from its machine code alone.

The measure is lane-instructions per cached element in the main loop: instructions in the loop x lanes of a warp x warps
/ elements that one iteration consumes. Decode attention has few of them to spend before it is bound by them rather than
by memory: a chip issues a fixed number of lanes' instructions in the time in which it reads an element's 3 bits.

Kernels are found by themselves: every module in kernels/ that offers `variants()`, see kernels/variant.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.compiling import CHIPS, Code, compile_variant, forbid_interpreter, offering
from benchmarks.log import open_log
from benchmarks.machine_code import CLASSES
from benchmarks.progress import bar

WORKERS = 2


@dataclass(frozen=True)
class Filters:
    """What to compile: names to take, all where there are none. modules: what offers variants, by full name."""

    archs: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    codecs: tuple[str, ...] = ()
    head_dims: tuple[int, ...] = ()
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One variant on one chip; status: "ok", or "failed" with a `reason` where it does not compile: no numbers then.

    variant: counts those of the same kernel, codec, head_dim and chip, from 1; `constants` say what they differ in.
    registers, spills, spill_detail: as in `compiling.Code`. shared_bytes, shared_limit: of one program.
    loop_instructions: of the main loop, as compiled; unrolled: how many iterations of the kernel's own it does, None
    where that cannot be told. lane_instructions_per_element and, class by class, by_class: None there too, and where
    the variant consumes no elements in a loop. by_opcode: instructions of the main loop. other_loops: those of
    the other loops, class by class. i2f: conversions from integers to floats in all loops. over_budget: each budget
    that is broken, in words.
    """

    kernel: str
    codec: str
    arch: str
    head_dim: int
    num_warps: int
    num_stages: int
    elements: int
    constants: dict[str, Any]
    shared_limit: int
    variant: int = 1
    status: str = "ok"
    reason: str | None = None
    registers: int | None = None
    spills: int | None = None
    spill_detail: dict[str, int] = field(default_factory=dict)
    shared_bytes: int | None = None
    loop_instructions: int | None = None
    unrolled: int | None = None
    lane_instructions_per_element: float | None = None
    by_class: dict[str, float] | None = None
    by_opcode: dict[str, int] = field(default_factory=dict)
    other_loops: tuple[dict[str, int], ...] = ()
    i2f: int | None = None
    over_budget: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        return self.kernel, self.codec, self.arch, self.head_dim, self.variant


@dataclass(frozen=True)
class Budget:
    """A field of `Row` and the most that it may be, for the named kernels, codecs, head_dims and archs; (): for all."""

    measure: str
    limit: float
    kernels: tuple[str, ...] = ()
    codecs: tuple[str, ...] = ()
    head_dims: tuple[int, ...] = ()
    archs: tuple[str, ...] = ()

    def broken(self, row: Row) -> str | None:
        """What is wrong, or None where nothing is or the budget is not for this row. What is not known is wrong too."""
        pairs = (row.kernel, self.kernels), (row.codec, self.codecs), (row.head_dim, self.head_dims)
        if not all(value in allowed for value, allowed in (*pairs, (row.arch, self.archs)) if allowed):
            return None
        value = getattr(row, self.measure)
        limit = KNOWN.get((self.measure, row.arch, row.kernel, row.codec), self.limit)
        if value is None:
            return f"{self.measure} is not known, at most {limit} is allowed"
        return f"{self.measure} is {value:.4g}, at most {limit} is allowed" if value > limit else None


#: What is over a budget and is to go, by measure, arch, kernel and codec; it may not grow till then. 256 states of a
#: one-bit trellis and keys that are rebuilt for many queries do not fit the registers; decode attention on codes does.
KNOWN = {
    ("spills", "sm_90", "encode", "trellis1/32"): 99,
    ("spills", "sm_90", "encode", "trellis4/128"): 4,
    ("spills", "sm_90", "restored token", "spectral3"): 2,
    ("spills", "sm_90", "restored token", "spectral4"): 2,
    ("spills", "sm_90", "restored token prefill", "spectral3"): 58,
    ("spills", "sm_90", "restored page prefill", "spectral3"): 41,
}

#: Codecs by what decoding them may cost: those of presets, and those of one look-up, or of none.
PRESETS = ("trellis3", "spectral3", "spectral4")
PLAIN = ("lloyd3", "lloyd4", "kivi2", "kivi3", "kivi4", "kivi8")

#: What the project asks of its kernels. The chip's shared memory bounds every one of them besides, see `judged`.
BUDGETS = (
    Budget("spills", 0),
    Budget("i2f", 0, ("decode",)),
    Budget("lane_instructions_per_element", 4.0, ("decode",), PRESETS, (128,), ("sm_90",)),
    Budget("lane_instructions_per_element", 3.0, ("decode",), PLAIN, (128,), ("sm_90",)),
)


def run(filters: Filters, output: Path) -> bool:
    """Print a table, add the rows to OUTPUT/results.jsonl, and return whether all budgets hold.

    Raises ValueError where TRITON_INTERPRET is set and where no variant fits the filters.
    """
    log = open_log(output, "static", Row, {})
    rows = []
    for row in measure(filters, Console(stderr=True)):
        rows.append(row)
        log.add(row)
    log.rewrite()
    console = Console()
    console.print(table(rows))
    console.print(f"Written: {log.path}", markup=False, soft_wrap=True)
    return not any(row.over_budget for row in rows)


def measure(filters: Filters, console: Console) -> Iterator[Row]:
    """Compile what fits the filters, in two processes, and yield the rows in a fixed order with progress on `console`.

    Raises ValueError where TRITON_INTERPRET is set and where no variant fits the filters.
    """
    forbid_interpreter()
    if unknown := set(filters.archs) - set(CHIPS):
        raise ValueError(f"unknown arch {', '.join(sorted(unknown))}, known are {', '.join(CHIPS)}")
    context = get_context("spawn")
    with ProcessPoolExecutor(WORKERS, mp_context=context) as pool, bar(console, 40) as progress:
        task = progress.add_task("reading kernels/", total=None)
        jobs = select(pool.submit(_jobs, filters.modules).result(), filters)
        progress.update(task, total=len(jobs))
        for row, result in [(row, pool.submit(_measure, filters.modules, *place, row)) for place, row in jobs]:
            progress.update(task, description=f"{row.kernel} {row.codec} D={row.head_dim} {row.arch}")
            yield result.result()
            progress.advance(task)


Job = tuple[tuple[str, int], Row]


def select(jobs: Sequence[Job], filters: Filters) -> list[Job]:
    """The jobs that fit. Raises ValueError, naming what there is, where none does or a name fits none."""
    if not jobs:
        raise ValueError("no module in kernels/ offers any variant")
    chosen = list(jobs)
    wanted = ("arch", filters.archs), ("kernel", filters.kernels), ("codec", filters.codecs)
    for name, allowed in (*wanted, ("head_dim", filters.head_dims)):
        known = {getattr(row, name) for _, row in jobs}
        if missing := [value for value in allowed if value not in known]:
            raise ValueError(f"no variant has {name} {missing[0]}, there are {', '.join(map(str, sorted(known)))}")
        chosen = [job for job in chosen if not allowed or getattr(job[1], name) in allowed]
    if not chosen:
        raise ValueError(f"no variant fits all of {filters}")
    return chosen


def _jobs(modules: Sequence[str]) -> list[Job]:
    """Where each variant is found, the module's name and its number there, and its empty row for each of its chips."""
    seen: Counter[tuple[str, str, str, int, int]] = Counter()
    jobs = []
    for module, variants in _offering(tuple(modules)).items():
        for number, variant in enumerate(variants):
            constants = {
                name: value if isinstance(value, (int, float)) else str(value)
                for name, value in variant.constants.items()
            }
            shape = variant.head_dim, variant.num_warps, variant.num_stages, variant.elements
            for arch in variant.archs:
                row = Row(variant.kernel, variant.codec, arch, *shape, constants, CHIPS[arch].shared_limit)
                seen[row.key] += 1
                jobs.append(((module, number), replace(row, variant=seen[row.key])))
    return jobs


@lru_cache
def _offering(modules: tuple[str, ...]) -> dict[str, list[Any]]:
    return offering(modules)


def _measure(modules: Sequence[str], module: str, number: int, row: Row) -> Row:
    variant = _offering(tuple(modules))[module][number]
    try:
        return judged(filled(row, compile_variant(variant, row.arch)))
    except Exception as error:  # whatever a compiler raises is a result of this one variant, and said in its row
        reason = f"{type(error).__name__}: {str(error).strip()[:300]}"
        return replace(row, status="failed", reason=reason, over_budget=(f"does not compile: {reason}",))


def filled(row: Row, code: Code) -> Row:
    """The row with what its variant was compiled to."""
    row = replace(
        row,
        registers=code.registers,
        spills=code.spills,
        spill_detail=code.spill_detail,
        shared_bytes=code.shared_bytes,
        other_loops=tuple(loop.by_class for loop in code.others),
        i2f=sum(loop.by_class["i2f"] for loop in (*code.others, *([code.main] if code.main else []))),
    )
    if code.main is None:
        return row
    row = replace(
        row,
        loop_instructions=len(code.main.instructions),
        unrolled=code.unrolled,
        by_opcode=code.main.by_opcode,
    )
    if not row.elements or code.unrolled is None:
        return row
    lanes = CHIPS[row.arch].lanes * row.num_warps / (row.elements * code.unrolled)
    return replace(
        row,
        lane_instructions_per_element=len(code.main.instructions) * lanes,
        by_class={name: count * lanes for name, count in code.main.by_class.items()},
    )


def judged(row: Row) -> Row:
    """The row with the budgets that it breaks; the chip's shared memory is one of them."""
    budgets = (*BUDGETS, Budget("shared_bytes", row.shared_limit))
    return replace(row, over_budget=tuple(filter(None, (budget.broken(row) for budget in budgets))))


def table(rows: Sequence[Row]) -> Table:
    """A line a row: registers, spills, shared memory in KiB, lane-instructions per element in total and by class."""
    used = [name for name in CLASSES if any(row.by_class and row.by_class[name] for row in rows)]
    columns = ("kernel", "codec", "D", "warps", "arch", "registers", "spills", "shared KiB", "lane-instr./el.", *used)
    result = Table(*columns, "over budget", title="lane-instructions per cached element in the main loop")
    for row in rows:
        classes = [number(row.by_class[name]) if row.by_class else "" for name in used]
        shared = "" if row.shared_bytes is None else f"{row.shared_bytes / 1024:.1f} / {row.shared_limit / 1024:.0f}"
        result.add_row(
            *map(str, (row.kernel, row.codec, row.head_dim, row.num_warps, row.arch)),
            *("" if value is None else str(value) for value in (row.registers, row.spills)),
            shared,
            number(row.lane_instructions_per_element),
            *classes,
            "; ".join(row.over_budget),
        )
    return result


def number(value: float | None) -> str:
    return "" if not value else f"{value:.2f}"
