"""What a kernel variant becomes on a chip, by Triton's own compilers and without that chip.

Triton is imported only within the functions: they run in worker processes of `benchmarks/static.py`, without
TRITON_INTERPRET, for a function that Triton interprets has no code to compile.
"""

from __future__ import annotations

import importlib
import math
import os
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.machine_code import Loop, Program, loops, main_loop, parse_amdgcn, parse_ptx, parse_sass

_DOT = re.compile(r"tt\.dot .* : tensor<(?P<left>[\w]+), .*-> tensor<(?P<out>\w+), (?P<layout>#\w+)>")

KERNELS = "kvcompress.kernels"


@dataclass(frozen=True)
class Chip:
    """lanes: threads of a warp or wave. shared_limit: bytes of shared memory that one program may have.

    Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD's CDNA3 ISA, LDS.
    """

    backend: str
    arch: int | str
    lanes: int
    shared_limit: int


CHIPS = {
    "sm_80": Chip("cuda", 80, 32, 163 * 1024),
    "sm_90": Chip("cuda", 90, 32, 227 * 1024),
    "sm_100": Chip("cuda", 100, 32, 227 * 1024),
    "gfx942": Chip("hip", "gfx942", 64, 64 * 1024),
}


@dataclass(frozen=True)
class Code:
    """A compiled variant. registers: of a thread; on AMD the vector ones, accumulators included.

    spills: registers of 32 bits that a thread keeps in memory or, scalar ones on AMD, in other registers' lanes.
    spill_detail: what that comes from, in bytes or registers as the compiler counts it. main: the main loop.
    unrolled: how many iterations of the kernel's own main loop one iteration of `main` does, None
    where that cannot be told.
    """

    registers: int
    spills: int
    shared_bytes: int
    spill_detail: dict[str, int] = field(default_factory=dict)
    main: Loop | None = None
    unrolled: int | None = None
    others: tuple[Loop, ...] = ()


def offering(modules: Sequence[str]) -> dict[str, list[Any]]:
    """The variants of each module; of every one in kernels/ that has a function `variants` where none are named."""
    named = modules or [f"{KERNELS}.{m.name}" for m in pkgutil.iter_modules(importlib.import_module(KERNELS).__path__)]
    loaded = {name: importlib.import_module(name) for name in named}
    if silent := [name for name in modules if not hasattr(loaded[name], "variants")]:
        raise ValueError(f"no function variants() in {', '.join(silent)}")
    return {name: module.variants() for name, module in loaded.items() if hasattr(module, "variants")}


def forbid_interpreter() -> None:
    """Raises ValueError where TRITON_INTERPRET is set; asks for fused products and sums, as launches have."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise ValueError(
            f"TRITON_INTERPRET={os.environ['TRITON_INTERPRET']}: interpreted kernels cannot be compiled, unset it"
        )
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"


def compile_variant(variant: Any, arch: str) -> Code:
    """Compile for one of `CHIPS`. Raises what Triton raises, and ValueError where its output is not understood."""
    forbid_interpreter()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    chip = CHIPS[arch]
    names = list(variant.signature)
    source = ASTSource(
        fn=variant.function,
        signature=dict(variant.signature),
        constexprs=dict(variant.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    kernel = triton.compile(source, target=GPUTarget(chip.backend, chip.arch, chip.lanes), options=options)
    return (_read_cuda if chip.backend == "cuda" else _read_amd)(kernel)


def _read_cuda(kernel: Any) -> Code:
    listing = _disassembled(kernel.asm["cubin"])
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing)}
    if len(usage) != 3:
        raise ValueError(f"cuobjdump -res-usage names no REG, STACK and LOCAL, but: {listing[:500]!r}")
    sass = parse_sass(listing)
    detail = {
        "stack_bytes": usage["STACK"],
        "local_bytes": usage["LOCAL"],
        "spill_store_bytes": _local_bytes(sass, "STL"),
        "spill_load_bytes": _local_bytes(sass, "LDL"),
    }
    found = loops(sass)
    main = main_loop(found)
    written = main_loop(loops(parse_ptx(kernel.asm["ptx"])))
    return Code(
        usage["REG"],
        -(-max(detail.values()) // 4),
        kernel.metadata.shared,
        detail,
        main,
        unrolling(main, {} if written is None else written.by_class),
        tuple(loop for loop in found if loop is not main),
    )


def _disassembled(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _local_bytes(program: Program, opcode: str) -> int:
    """Bytes that the instructions STL or LDL move, each counted once: what `ptxas -v` calls spill stores and loads."""
    moved = 0
    for name in (i.opcode for i in program.instructions if i.opcode.partition(".")[0] == opcode):
        bits = re.search(r"\.[US]?(8|16|64|128)\b", name)
        moved += int(bits[1]) // 8 if bits else 4
    return moved


def unrolling(main: Loop | None, written: Mapping[str, int]) -> int | None:
    """Iterations of the kernel's own main loop in one of the compiled one.

    written: how many instructions of a class the kernel's own has. Matrix instructions decide, or accesses to global
    memory in a loop without any: one of PTX is one of SASS, for 16-bit floats and integers. None where they do not
    tell. Raises ValueError where the numbers of matrix instructions say that the loops cannot be the same.
    """
    if main is None:
        return None
    name = "mma" if main.by_class["mma"] else "global"
    compiled, own = main.by_class[name], written.get(name, 0)
    if own and compiled and compiled % own == 0:
        return compiled // own
    if name == "global":
        return None
    raise ValueError(
        f"the main loop has {compiled} matrix instructions, as it was written {own}: "
        "how often it was unrolled cannot be told"
    )


def _read_amd(kernel: Any) -> Code:
    text = kernel.asm["amdgcn"]
    names = ("vgpr_count", "agpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    counts = {name: re.search(rf"\.{name}:\s+(\d+)", text) for name in names}
    if missing := [name for name, count in counts.items() if count is None]:
        raise ValueError(f"the amdgcn text does not say {', '.join(missing)}")
    number = {name: int(count[1]) for name, count in counts.items() if count is not None}
    detail = {
        "private_bytes": number["private_segment_fixed_size"],
        "vgpr_spills": number["vgpr_spill_count"],
        "sgpr_spills": number["sgpr_spill_count"],
    }
    spills = max(detail["vgpr_spills"], -(-detail["private_bytes"] // 4)) + detail["sgpr_spills"]
    found = loops(parse_amdgcn(text))
    main = main_loop(found)
    return Code(
        number["vgpr_count"],
        spills,
        kernel.metadata.shared,
        detail,
        main,
        unrolling(main, {"mma": matrix_instructions(kernel.asm["ttgir"])}),
        tuple(loop for loop in found if loop is not main),
    )


def matrix_instructions(ttgir: str) -> int:
    """Matrix instructions that a wave does in one iteration of a kernel's main loop, 0 without a loop that has any.

    From Triton's own form of an AMD kernel, for there the loops are still as they were written: every tt.dot says what
    its tiles are, and its layout how large one instruction's is. The loop is chosen as `main_loop` does.
    """
    layouts = {
        name: tuple(tuple(map(int, numbers.split(","))) for numbers in both)
        for name, *both in re.findall(
            r"(#\w+) = #ttg.amd_mfma<.*?warpsPerCTA = \[(.*?)\].*?instrShape = \[(.*?)\]", ttgir
        )
    }
    open_regions: list[list[float] | None] = []  # of a loop, its matrix instructions; None: another region
    closed: list[float] = []
    for line in ttgir.splitlines():
        if (found := _DOT.search(line)) and found["layout"] in layouts:  # others are done by plain multiplications
            warps, (*tile, depth) = layouts[found["layout"]]
            tile = [1] * (len(warps) - 2) + tile
            steps = [-(-int(n) // (w * t)) for n, w, t in zip(found["out"].split("x")[:-1], warps, tile, strict=True)]
            inner = int(found["left"].split("x")[-2])
            if loop := next((region for region in reversed(open_regions) if region is not None), None):
                loop[0] += math.prod(steps) * -(-inner // depth)
        change = line.count("{") - line.count("}")
        if change > 0:
            open_regions.append([0] if re.search(r"scf\.(for|while)\b", line) else None)
        elif change < 0 and (region := open_regions.pop()) and region[0]:
            closed.append(region[0])
            for around in filter(None, open_regions):
                around[0] = -math.inf  # a loop within it is more inward
    return int(max(closed, default=0))
