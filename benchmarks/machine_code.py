"""Machine code as text: NVIDIA's SASS and PTX, AMD's amdgcn; their loops, and their instructions by class.

Loops are the natural loops of the control flow graph (Aho, Lam, Sethi, Ullman, Compilers, 9.6): an edge back to a block
that dominates where it comes from, and all blocks that reach that edge without passing its target. So a block that the
assembler moved behind the function's end counts where it runs, and the endless branch that ends every SASS function,
which nothing reaches, does not.

The main loop is, of the loops that hold a matrix instruction (of all, where none does), one within which no other of
them lies; the one with most instructions, if several are left. A kernel with a loop over full pages and one over a
ragged page is thus judged by the dearer. Every instruction of a loop counts once, both sides of a branch within it too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

#: The classes of instructions. move: between registers, constants included. fma: all floating-point arithmetic on the
#: ordinary units. integer: additions, products, comparisons. convert: between number formats, i2f apart. local:
#: registers that were spilled. other: branches, barriers, selections, constant memory and what has no class here.
CLASSES = "i2f bit move fma integer special shuffle shared global mma convert local other".split()

_SASS_OPCODES = {
    "i2f": "I2F I2FP UI2F UI2FP",
    "bit": "LOP LOP3 LOP32I PLOP3 SHF SHL SHR PRMT BMSK BREV FLO POPC SGXT BFE BFI",
    "move": "MOV MOV32I CS2R R2UR UR2UP R2P P2R",
    "fma": "FFMA FADD FMUL FFMA2 FADD2 FMUL2 FFMA32I FMUL32I FADD32I FMNMX FMNMX3 FSETP FSET FCHK FSWZADD "
    "HFMA2 HADD2 HMUL2 HMNMX2 HSETP2 HSET2 HADD2_32I HFMA2_32I HMUL2_32I DFMA DADD DMUL DSETP",
    "integer": "IADD IADD2 IADD3 IADD32I LEA IMAD IMUL ISCADD IMNMX ISETP ISET IABS IDP IDP4A VIADD VIADDMNMX VIMNMX "
    "VIMNMX3 VABSDIFF VABSDIFF4 VHMNMX IADD64 ISETP64",
    "special": "MUFU",
    "shuffle": "SHFL REDUX CREDUX MATCH MOVM",
    "shared": "LDS STS LDSM STSM ATOMS LDTM STTM UTCCP",
    "global": "LDG STG LDGSTS LD ST ATOM ATOMG RED REDG REDAS UBLKCP UBLKPF UTMALDG UTMASTG UTMAREDG UTMAPF",
    "convert": "F2F F2FP F2I F2IP FRND I2I I2IP",
    "local": "LDL STL",
}
_SASS_CLASS = {opcode: name for name, opcodes in _SASS_OPCODES.items() for opcode in opcodes.split()}
_SASS_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")

# The first that matches decides. Scalar instructions (s_) count as the other ones: a wave issues them too.
_AMDGCN_CLASS = tuple(
    (name, re.compile(pattern))
    for name, pattern in (
        ("mma", r"v_s?mfma"),
        ("i2f", r"v_cvt_f(16|32|64)_([iu](16|32)|ubyte\d)"),
        ("convert", r"v_cvt_|v_(rndne|trunc|floor|ceil|fract)_"),
        ("shuffle", r"ds_b?permute|ds_swizzle|v_permlane|v_mov_b32_dpp"),
        ("shared", r"ds_"),
        ("local", r"scratch_"),
        ("global", r"global_|buffer_|flat_"),
        ("special", r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_"),
        ("move", r"[vs]_c?mov(k|rel\w*)?_|v_accvgpr_|v_(readfirst|read|write)lane|v_swap_|v_pk_mov_"),
        ("other", r"v_cndmask|s_cselect|s_cbranch|s_load|s_waitcnt|s_nop"),
        ("integer", r"[vs]_(lshl_add|add_lshl|xad|add3|lshl[1-4]_add)_|[vs]_(pk_)?\w+_[iu](8|16|24|32|64)(_|$)"),
        ("fma", r"v_\w+_f(16|32|64)(_|$)|v_pk_\w+_f"),
        (
            "bit",
            r"[vs]_(perm|and|or|or3|xor|not|nor|nand|xnor|andn2|orn2|lsh[lr]|lsh[lr]rev|ashr|ashrrev|lshl_or|and_or)_",
        ),
        ("bit", r"[vs]_(bf|align|ff|bcnt|flb|brev|sext|pk_lsh|pk_ash|mbcnt)"),
    )
)
_PTX_CLASS = (
    ("mma", re.compile(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma")),
    ("global", re.compile(r"(ld|st|atom|red)\.(\w+\.)*global|cp\.async\.c[ag]")),
)


@dataclass(frozen=True)
class Instruction:
    """target: the label that it may branch to. falls_through: whether the next instruction may follow it."""

    opcode: str
    operands: str = ""
    kind: str = "other"
    target: str | None = None
    falls_through: bool = True


@dataclass(frozen=True)
class Program:
    """labels: the number of the instruction that each stands before."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


@dataclass(frozen=True)
class Loop:
    """The numbers of a loop's instructions, and the instructions themselves."""

    numbers: frozenset[int]
    instructions: tuple[Instruction, ...]

    @property
    def by_class(self) -> dict[str, int]:
        """Instructions of each of `CLASSES`, zeros included."""
        counts = Counter(instruction.kind for instruction in self.instructions)
        return {name: counts[name] for name in CLASSES}

    @property
    def by_opcode(self) -> dict[str, int]:
        """Instructions by mnemonic without its modifiers, most frequent first."""
        return dict(Counter(i.opcode.partition(".")[0] for i in self.instructions).most_common())


def parse_sass(text: str) -> Program:
    """What `cuobjdump -sass` prints of a file with one function: `/*0160*/  @!P0 BRA 0x6d0 ;  /* encoding */`.

    The rare branches for a warp that has come apart (BRA.DIV) are left out: no warp of ours does. Raises ValueError
    where there are several functions, and where a branch leads nowhere.
    """
    if len(functions := re.findall(r"^\s*Function : (\S+)", text, re.MULTILINE)) != 1:
        raise ValueError(f"one function of SASS can be read at a time, got {len(functions)}: {', '.join(functions)}")
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := _SASS_LINE.match(line):
            labels[hex(int(found[1], 16))] = len(instructions)
            instructions.append(_sass_instruction(found[2], found[3], found[4].strip()))
    return _checked(instructions, labels)


def _sass_instruction(guard: str | None, opcode: str, operands: str) -> Instruction:
    base = opcode.partition(".")[0]
    kind = _sass_class(base, opcode, operands)
    if base == "BRA" and not opcode.startswith("BRA.DIV"):
        target = operands.rpartition(" ")[2]
        return Instruction(opcode, operands, kind, target, guard is not None or "," in operands)
    ends = base in ("EXIT", "RET", "BRX", "JMP", "KILL") and guard is None
    return Instruction(opcode, operands, kind, None, not ends)


def _sass_class(base: str, opcode: str, operands: str) -> str:
    if base.endswith("MMA"):
        return "mma"
    # The assembler moves through multipliers too, to spread the load: 0 * 0 + x.
    if opcode.startswith("IMAD.MOV") or (base in ("IMAD", "UIMAD") and re.search(r"RZ, U?RZ, ", operands)):
        return "move"
    if base == "HFMA2" and "-RZ, RZ, " in operands:
        return "move"
    if opcode.startswith("IMAD.SHL"):
        return "bit"
    return _SASS_CLASS.get(base) or _SASS_CLASS.get(base.removeprefix("U"), "other")


def parse_amdgcn(text: str) -> Program:
    """What `asm["amdgcn"]` of a compiled Triton kernel holds. Raises ValueError where a branch leads nowhere."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        code = line.partition(";")[0].strip()
        if label := re.fullmatch(r"(\.LBB\w+):", code):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"((?:v|s|ds|global|buffer|flat|scratch)_\w+)\s*(.*)", code):
            opcode, operands = found[1], found[2]
            branches = opcode.startswith(("s_cbranch", "s_branch"))
            ends = opcode in ("s_branch", "s_endpgm", "s_setpc_b64")
            instructions.append(
                Instruction(opcode, operands, _amdgcn_class(opcode), operands if branches else None, not ends)
            )
    return _checked(instructions, labels)


def _amdgcn_class(opcode: str) -> str:
    return next((name for name, pattern in _AMDGCN_CLASS if pattern.match(opcode)), "other")


def parse_ptx(text: str) -> Program:
    """PTX; only instructions of the classes mma and global get one. Raises ValueError where a branch leads nowhere."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    body = re.sub(r"//[^\n]*", "", text)
    for statement in re.split(r"[;{}\n]", body[max(body.find(".entry"), 0) :]):
        code = statement.strip()
        while label := re.match(r"(\$\w+):\s*", code):
            labels[label[1]] = len(instructions)
            code = code[label.end() :]
        if found := re.match(r"(@!?%\w+\s+)?([a-z][\w.:]*)\s*(.*)", code):
            opcode, operands = found[2], found[3]
            branches = opcode in ("bra", "bra.uni")
            ends = (branches or opcode in ("ret", "exit", "trap")) and found[1] is None
            kind = next((name for name, pattern in _PTX_CLASS if pattern.match(opcode)), "other")
            instructions.append(Instruction(opcode, operands, kind, operands if branches else None, not ends))
    return _checked(instructions, labels)


def _checked(instructions: Sequence[Instruction], labels: dict[str, int]) -> Program:
    for instruction in instructions:
        if instruction.target is not None and labels.get(instruction.target, len(instructions)) >= len(instructions):
            raise ValueError(f"no instruction at the target of {instruction.opcode} {instruction.operands}")
    return Program(tuple(instructions), labels)


def loops(program: Program) -> list[Loop]:
    """All loops in the order of their first instructions; those that share a header are one."""
    starts, successors = _blocks(program)
    ends = [*starts[1:], len(program.instructions)]
    dominators = _dominators(successors)
    predecessors: dict[int, list[int]] = {block: [] for block in dominators}
    for block in dominators:
        for after in successors[block]:
            predecessors[after].append(block)
    bodies: dict[int, set[int]] = {}
    for block in dominators:
        for header in successors[block]:
            if header in dominators[block]:
                bodies.setdefault(header, {header}).update(_reaching(block, header, predecessors))
    found = []
    for body in bodies.values():
        numbers = sorted(n for block in body for n in range(starts[block], ends[block]))
        found.append(Loop(frozenset(numbers), tuple(program.instructions[n] for n in numbers)))
    return sorted(found, key=lambda loop: (min(loop.numbers), -len(loop.numbers)))


def main_loop(found: Sequence[Loop]) -> Loop | None:
    """The loop that a kernel is judged by, as the module's docstring defines it; None where there is no loop."""
    candidates = [loop for loop in found if loop.by_class["mma"]] or list(found)
    innermost = [loop for loop in candidates if not any(other.numbers < loop.numbers for other in candidates)]
    return max(innermost, key=lambda loop: len(loop.numbers), default=None)


def _blocks(program: Program) -> tuple[list[int], list[list[int]]]:
    """The numbers of the instructions that open a basic block, and for each block those that may follow it."""
    code = program.instructions
    leaders = {0} | {program.labels[i.target] for i in code if i.target is not None}
    leaders |= {n + 1 for n, i in enumerate(code[:-1]) if i.target is not None or not i.falls_through}
    starts = sorted(leaders)
    block_at = {start: block for block, start in enumerate(starts)}
    successors = []
    for end in [*starts[1:], len(code)]:
        last = code[end - 1]
        after = [block_at[program.labels[last.target]]] if last.target is not None else []
        if last.falls_through and end < len(code):
            after.append(block_at[end])
        successors.append(after)
    return starts, successors


def _dominators(successors: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    """For every block that the first one reaches, the blocks that every way from the first one to it passes."""
    reached = {0}
    pending = [0]
    while pending:
        for after in successors[pending.pop()]:
            if after not in reached:
                reached.add(after)
                pending.append(after)
    before: dict[int, list[int]] = {block: [b for b in reached if block in successors[b]] for block in reached}
    dominators = {block: set(reached) for block in reached}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            common = set.intersection(*(dominators[b] for b in before[block])) | {block}
            changed |= common != dominators[block]
            dominators[block] = common
    return dominators


def _reaching(block: int, header: int, predecessors: dict[int, list[int]]) -> set[int]:
    """The blocks that reach `block` without passing `header`."""
    body = {header}
    pending = [block]
    while pending:
        current = pending.pop()
        if current not in body:
            body.add(current)
            pending += predecessors[current]
    return body
