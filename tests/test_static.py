"""`python -m benchmarks static`: its readers of machine code on recorded text, then on kernels compiled afresh.

Expected numbers are counted by hand from the text or follow from a kernel's shape; each says how.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.compiling import matrix_instructions, unrolling
from benchmarks.log import readable
from benchmarks.machine_code import CLASSES, loops, main_loop, parse_amdgcn, parse_ptx, parse_sass
from benchmarks.static import PLAIN, PRESETS, Filters, Row, judged, select

ROOT = Path(__file__).resolve().parents[1]
TRITON = importlib.util.find_spec("triton")
COMPILERS = Path(TRITON.submodule_search_locations[0]) / "backends" if TRITON else None  # type: ignore[index]
needs_ptxas = pytest.mark.skipif(
    COMPILERS is None or not (COMPILERS / "nvidia/bin/ptxas").exists(), reason="Triton's ptxas is not installed here"
)

# A loop over rows that ptxas unrolled four times, lines of it left out: 0x200 to 0x3b0, then the one for what remains,
# 0x520 to 0x5b0, and the endless branch behind the end. 0x300 jumps out of line and back, as rare cases do.
SASS = """
\t\tFunction : integers
\t.headerflags\t@"EF_CUDA_SM100"
        /*0000*/                   LDC R1, c[0x0][0x37c] ;                  /* 0x0000df00ff017b82 */
                                                                            /* 0x000fe20000000800 */
        /*0070*/                   BRA.U !UP0, 0x5c0 ;
        /*01c0*/              @!P1 BRA 0x520 ;
        /*0200*/                   VIADD R5, R12.reuse, 0x20 ;
        /*0210*/                   IADD3 R2, P1, PT, R12.reuse, R15.reuse, RZ ;
        /*0270*/                   LDG.E.U8 R2, desc[UR6][R2.64] ;
        /*02b0*/                   LDG.E.U8 R4, desc[UR6][R4.64] ;
        /*0300*/               @P3 BRA 0x620 ;
        /*0320*/                   BRA.DIV UR4, 0x640 ;
        /*0330*/                   I2FP.F32.U32 R10, R2 ;
        /*0340*/                   FFMA R10, R10, 0.5, R11 ;
        /*0350*/                   IMAD.U32 R2, RZ, RZ, UR5 ;
        /*0360*/                   UIMAD.WIDE.U32 UR4, UR4, 0x20, URZ ;
        /*0370*/                   HFMA2 R5, -RZ, RZ, 0, 0 ;
        /*0380*/                   IMAD.SHL.U32 R4, R0.reuse, 0x8, RZ ;
        /*0390*/                   USHF.L.U32 UR10, UR9, 0xc, URZ ;
        /*03b0*/              @!P1 BRA 0x200 ;
        /*0520*/                   IADD3 R2, P0, PT, R12, R15, RZ ;
        /*0540*/                   LDG.E.U8 R2, desc[UR6][R2.64] ;
        /*05b0*/               @P0 BRA 0x520 ;
        /*05c0*/                   STG.E desc[UR6][R2.64], R11 ;
        /*0600*/                   EXIT ;
        /*0620*/                   MUFU.RCP R7, R8 ;
        /*0630*/                   BRA 0x320 ;
        /*0640*/                   SHFL.BFLY PT, R3, R2, 0x10, 0x1f ;
        /*0650*/                   BRA 0x330;
        /*0660*/                   BRA 0x660;
"""

# Two loops over tiles within a loop over heads; the second has more instructions, the third most but no MMA.
NESTED = """
\t\tFunction : nested
        /*0000*/                   MOV R1, R2 ;
        /*0010*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0020*/               @P0 BRA 0x10 ;
        /*0030*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0040*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0050*/               @P1 BRA 0x30 ;
        /*0060*/                   IADD3 R1, R1, R1, RZ ;
        /*0070*/               @P2 BRA 0x0 ;
        /*0080*/                   MOV R1, R2 ;
        /*0090*/                   MOV R1, R2 ;
        /*00a0*/                   MOV R1, R2 ;
        /*00b0*/               @P2 BRA 0x80 ;
        /*00c0*/                   EXIT ;
"""

AMDGCN = """
kernel:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
\ts_cbranch_scc1 .LBB0_5
.LBB0_3:                                ; =>This Inner Loop Header: Depth=1
\tbuffer_load_ubyte v2, v0, s[8:11], 0 offen
\ts_waitcnt vmcnt(7)
\tv_cvt_f32_ubyte0_e32 v2, v2
\tv_cvt_f16_f32_e32 v3, v2
\tv_perm_b32 v3, v4, v5, v6
\tv_lshl_add_u32 v3, v4, 2, v6
\tv_lshlrev_b32_e32 v3, 2, v6
\tv_and_or_b32 v3, v4, v5, v6
\tv_pk_fma_f16 v1, v2, v3, v4
\tv_mfma_f32_16x16x16_f16 v[0:3], v[4:5], v[6:7], v[0:3]
\tv_accvgpr_read_b32 v3, a3
\tv_exp_f32_e32 v3, v3
\tv_mov_b32_dpp v3, v4 row_shr:1 row_mask:0xf bank_mask:0xf
\tds_read_b128 v[4:7], v8
\tscratch_load_dword v9, off, off
\tv_cndmask_b32_e32 v3, v4, v5, vcc
\tv_cmp_lt_i32_e32 vcc, v3, v4
\tv_max_f32_e32 v3, v4, v5
\ts_cbranch_scc1 .LBB0_3
.LBB0_5:
\ts_endpgm
"""

PTX = """
.visible .entry kernel(
\t.param .u64 .ptr .global .align 16 kernel_param_0
) {
$L__BB0_1: // %loop
\tmma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %r1 }, { %r2 }, { %r3 }, { %r1 };
\t@%p1 ld.global.b32 { %r5 }, [ %rd1 + 0 ]; ld.shared.b32 %r5, [%r6];
\t@%p2 bra $L__BB0_1;
\t@%p3 bra \t$L__BB0_2;
\tbra.uni $L__BB0_2;
$L__BB0_2:
\tret;
}
"""


def counts(found: Any) -> dict[str, int]:
    return {name: count for name, count in found.by_class.items() if count}


def test_sass_loops_are_found_where_control_goes_and_not_where_lines_stand():
    unrolled, rest = loops(parse_sass(SASS))
    # 14 lines from 0x200 to 0x3b0, and the two out of line at 0x620; not those for a warp that has come apart at 0x640.
    assert len(unrolled.instructions) == 16
    assert [i.opcode for i in rest.instructions] == ["IADD3", "LDG.E.U8", "BRA"]
    assert main_loop([unrolled, rest]) is unrolled


def test_sass_classes_tell_moves_and_shifts_in_the_multiplier_from_products():
    unrolled, _ = loops(parse_sass(SASS))
    # integer: VIADD, IADD3, UIMAD.WIDE; move: IMAD.U32 of 0 * 0 + x, HFMA2 of 0 * 0; bit: IMAD.SHL, USHF; other: BRA
    expected = {"integer": 3, "global": 2, "other": 4, "i2f": 1, "fma": 1, "move": 2, "bit": 2, "special": 1}
    assert counts(unrolled) == expected
    assert list(unrolled.by_class) == CLASSES
    assert unrolled.by_opcode["BRA"] == 4


def test_the_main_loop_is_the_largest_innermost_one_with_a_matrix_instruction():
    found = loops(parse_sass(NESTED))
    assert [len(loop.instructions) for loop in found] == [8, 2, 3, 4]
    assert main_loop(found) is found[2]
    assert main_loop([found[3]]) is found[3]
    assert main_loop([]) is None


def test_sass_that_is_not_understood_is_refused():
    with pytest.raises(ValueError, match="one function of SASS can be read at a time, got 2: nested, integers"):
        parse_sass(NESTED + SASS)
    with pytest.raises(ValueError, match="no instruction at the target of BRA 0x5c8"):
        parse_sass(SASS.replace("BRA 0x520 ;", "BRA 0x5c8 ;"))


def test_amdgcn_loop_and_classes():
    (loop,) = loops(parse_amdgcn(AMDGCN))
    assert len(loop.instructions) == 19
    # integer: v_lshl_add, v_cmp; bit: v_perm, v_lshlrev, v_and_or; fma: v_pk_fma, v_max; other: wait, cndmask, branch
    expected = {"integer": 2, "bit": 3, "fma": 2, "other": 3}
    singles = dict.fromkeys(("i2f", "convert", "mma", "move", "special", "shuffle", "shared", "local", "global"), 1)
    assert counts(loop) == expected | singles


def test_ptx_loop():
    (loop,) = loops(parse_ptx(PTX))
    assert counts(loop) == {"mma": 1, "global": 1, "other": 2}  # ld.shared and the branch


def test_unrolling_is_told_by_matrix_instructions_or_else_by_global_accesses():
    largest = main_loop(loops(parse_sass(NESTED)))
    assert unrolling(largest, {"mma": 1, "global": 1}) == 2
    with pytest.raises(ValueError, match="has 2 matrix instructions, as it was written 3"):
        unrolling(largest, {"mma": 3})
    without = main_loop(loops(parse_sass(SASS)))
    assert unrolling(without, {"global": 1}) == 2  # as recorded it was 4, two of the loads are left out above
    assert unrolling(without, {}) is None
    assert unrolling(None, {"mma": 1}) is None


def test_matrix_instructions_of_a_loop_before_it_is_compiled():
    """16 x 64 outputs in tiles of 16 x 16, by two waves side by side, over 48 in steps of 16: 1 x 2 x 3."""
    layout = "#mma = #ttg.amd_mfma<{version = 3, warpsPerCTA = [1, 2], instrShape = [16, 16, 16], isTransposed = true}>"
    left, right = (f"#ttg.dot_op<{{opIdx = {side}, parent = #mma, kWidth = 4}}>" for side in (0, 1))
    operands = f"tensor<16x48xf16, {left}> * tensor<48x64xf16, {right}>"
    dot = f"%o = tt.dot %a, %b, %c : {operands} -> tensor<16x64xf32, #mma> loc(#l)"
    loop = "%t = scf.for %i = %a to %b step %c iter_args(%x = %y) -> (tensor<16x64xf32, #mma>)  : i32 {"
    other = "scf.if %p {"
    assert matrix_instructions("\n".join([layout, loop, dot, "} {tt.num_stages = 1 : i32} loc(#l)"])) == 6
    assert matrix_instructions("\n".join([layout, loop, other, dot, dot, "} else {", "}", "} loc(#l)"])) == 12
    assert matrix_instructions("\n".join([layout, loop, dot, dot, loop, dot, "}", "}"])) == 6  # the inner one
    assert matrix_instructions("\n".join([layout, other, dot, "}"])) == 0


ROW = Row(
    "decode", "trellis3", "sm_90", 128, 1, 1, 16384, {}, 227 * 1024, registers=172, spills=0, shared_bytes=8192, i2f=0
)


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({"lane_instructions_per_element": 4.0}, []),
        ({"lane_instructions_per_element": 4.01}, ["lane_instructions_per_element is 4.01, at most 4.0 is allowed"]),
        ({"lane_instructions_per_element": None}, ["lane_instructions_per_element is not known"]),
        ({"lane_instructions_per_element": 4.01, "arch": "sm_80"}, []),
        ({"lane_instructions_per_element": 4.01, "head_dim": 64}, []),
        ({"lane_instructions_per_element": 3.1, "codec": "kivi4"}, ["at most 3.0"]),
        ({"lane_instructions_per_element": 3.1, "i2f": 1, "spills": 2}, ["spills is 2", "i2f is 1"]),
        ({"kernel": "encode", "i2f": 1}, []),
        ({"kernel": "encode", "shared_bytes": 227 * 1024 + 16}, ["shared_bytes is"]),
    ],
)
def test_budgets(changes: dict[str, Any], broken: list[str]):
    found = judged(replace(ROW, **changes)).over_budget
    assert len(found) == len(broken)
    assert all(part in text for part, text in zip(broken, found, strict=True))


def test_filters_name_what_there_is():
    jobs = [
        (("m", 0), ROW),
        (("m", 0), replace(ROW, arch="gfx942")),
        (("m", 1), replace(ROW, kernel="merge", codec="-")),
    ]
    assert select(jobs, Filters(archs=("gfx942",))) == jobs[1:2]
    assert select(jobs, Filters(kernels=("merge", "decode"), codecs=("-",))) == jobs[2:]
    with pytest.raises(ValueError, match="no variant has codec trellis, there are -, trellis3"):
        select(jobs, Filters(codecs=("trellis",)))
    with pytest.raises(ValueError, match="no variant fits all of"):
        select(jobs, Filters(codecs=("-",), archs=("gfx942",)))
    with pytest.raises(ValueError, match="no module in kernels/ offers any variant"):
        select([], Filters(archs=("sm_90",)))


def test_the_command_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = CliRunner().invoke(app, ["static", "--arch", "sm_91"])
    assert (done.exit_code, "unknown arch sm_91, known are sm_80, sm_90, sm_100, gfx942" in done.output) == (2, True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = CliRunner().invoke(app, ["static"])
    assert (done.exit_code, "interpreted kernels cannot be compiled" in done.output) == (2, True)


def test_every_kernel_offers_its_variants():
    """A file with a program number in it is launched, so it must be measured."""
    texts = {path.name: path.read_text("utf-8") for path in (ROOT / "kernels").glob("*.py")}
    launched = {name for name, text in texts.items() if "tl.program_id(" in text}
    assert launched - {name for name, text in texts.items() if "\ndef variants(" in text} == set()


def static(folder: Path, *arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    """The command in a process of its own: exit status, rows, and standard error."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-m", "benchmarks", "static", "--output", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**kept, "PYTHONPATH": paths})
    rows = readable((folder / "results.jsonl").read_text().splitlines())
    return done.returncode, rows, done.stderr


@pytest.mark.slow
@needs_ptxas
def test_compiled_kernels(tmp_path: Path):
    """tests/static_kernels.py on two chips: numbers that follow from the shapes, and budgets that are broken."""
    status, rows, log = static(tmp_path, "--module", "static_kernels", "--arch", "sm_90 gfx942")
    assert status == 1, log
    assert [{f.name for f in fields(Row)} - set(row) for row in rows] == [set()] * 5
    assert {row["benchmark"] for row in rows} == {"static"}
    nvidia, amd, decode, amd_decode, crowd = rows

    told = nvidia["kernel"], nvidia["arch"], nvidia["head_dim"], nvidia["variant"], nvidia["status"]
    assert told == ("products", "sm_90", 64, 1, "ok")
    # [16, 64] @ [64, 64] takes 8 x 4 products of 16 x 8 x 16, 16 for each of two warps; 32 lanes, 4096 elements.
    assert nvidia["by_opcode"]["HMMA"] == 16 * nvidia["unrolled"]
    assert nvidia["by_class"]["mma"] == pytest.approx(16 * 32 * 2 / 4096)
    # On AMD 4 x 4 products of 16 x 16 x 16, 8 for each of two waves of 64.
    assert amd["by_opcode"]["v_mfma_f32_16x16x16_f16"] == 8 * amd["unrolled"]
    assert amd["by_class"]["mma"] == pytest.approx(8 * 64 * 2 / 4096)
    for row, limit in ((nvidia, 227), (amd, 64)):
        assert (row["spills"], row["i2f"], row["over_budget"], row["shared_limit"]) == (0, 0, [], limit * 1024)
        assert 16 <= row["registers"] <= 255  # 32 lanes x 2 warps hold 1024 sums in 16 registers each
        assert 8192 <= row["shared_bytes"] <= 16384  # a [64, 64] tile of 16 bits passes through it
        total = sum(row["by_class"].values())
        assert row["lane_instructions_per_element"] == pytest.approx(total)
        assert row["loop_instructions"] * (64 if row["arch"] == "gfx942" else 32) * 2 / 4096 == pytest.approx(
            total * row["unrolled"]
        )

    # One byte a lane is loaded, made a float, and added: one conversion an element however often ptxas unrolls.
    assert decode["by_class"]["i2f"] == 1
    assert decode["unrolled"] > 1
    assert any(text.startswith("i2f is") for text in decode["over_budget"])
    assert (amd_decode["unrolled"], amd_decode["lane_instructions_per_element"]) == (None, None)

    # 8192 sums in one warp are 256 registers a lane, of which there are 255 at most.
    assert crowd["spills"] > 0
    assert crowd["over_budget"] == [f"spills is {crowd['spills']:.4g}, at most 0 is allowed"]


@pytest.mark.slow
@needs_ptxas
def test_spills_are_those_that_ptxas_reports(tmp_path: Path):
    script = (
        "import json, static_kernels; from benchmarks.compiling import compile_variant\n"
        "variant = next(v for v in static_kernels.variants() if v.kernel == 'crowd')\n"
        "print(json.dumps(compile_variant(variant, 'sm_90').spill_detail))"
    )
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    report = {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DUMP_PTXAS_LOG": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=kept | report, check=True)
    found = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stdout)
    assert found is not None, done.stdout
    detail = json.loads(done.stdout.splitlines()[-1])
    names = ("stack_bytes", "spill_store_bytes", "spill_load_bytes")
    assert [detail[name] for name in names] == [int(number) for number in found.groups()]


@pytest.mark.slow
@needs_ptxas
def test_our_kernels_keep_their_budgets(tmp_path: Path):
    """All variants for head_dim 128 on sm_90; `python -m benchmarks static` holds the other ones to theirs."""
    status, rows, log = static(tmp_path, "--arch", "sm_90", "--head-dim", "128")
    over = {
        f"{row['kernel']} {row['codec']} {row['constants']}": row["over_budget"] for row in rows if row["over_budget"]
    }
    assert over == {}
    assert status == 0, log
    assert {row["codec"] for row in rows if row["kernel"] == "decode"} >= {*PRESETS, *PLAIN}
