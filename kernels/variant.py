"""One specialisation of a kernel, as `python -m benchmarks static` compiles it without a GPU.

A kernel file offers `variants() -> list[Variant]`: all specialisations that it is launched with, one `Variant` each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: What every kernel is compiled for: NVIDIA's A100, H100 and B200, AMD's MI300.
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Variant:
    """kernel: its name, such as "decode". codec: whose codes it reads or writes, such as "trellis3", or "-".

    function: the `@triton.jit` function. signature: the type of every argument by name and in order, "*fp16", "*i64",
    "i32", "fp32" or "constexpr". constants: the values of the constexpr ones. aligned: the arguments that are multiples
    of 16, as Triton finds by itself of pointers and integers at a launch. elements: how many cached elements one
    program consumes in one iteration of its main loop (benchmarks/machine_code.py says which loop that is); keys and
    values count both, whatever they are packed in. 0 where no loop consumes any. archs: what it is meant for.

    Raises ValueError where names do not fit together.
    """

    kernel: str
    codec: str
    head_dim: int
    function: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    elements: int = 0
    archs: tuple[str, ...] = ARCHS

    def __post_init__(self) -> None:
        arguments, constexprs = (
            list(self.function.arg_names),
            [n for n, t in self.signature.items() if t == "constexpr"],
        )
        if list(self.signature) != arguments:
            raise ValueError(f"{self}: signature names {list(self.signature)}, its function takes {arguments}")
        if set(self.constants) != set(constexprs):
            raise ValueError(
                f"{self}: constants gives {sorted(self.constants)}, the constexprs are {sorted(constexprs)}"
            )
        if unknown := set(self.aligned) - (set(arguments) - set(constexprs)):
            raise ValueError(f"{self}: aligned names {sorted(unknown)}, no arguments at run time")
        if unknown := set(self.archs) - set(ARCHS):
            raise ValueError(f"{self}: archs names {sorted(unknown)}, known are {', '.join(ARCHS)}")
        if self.elements < 0:
            raise ValueError(f"{self}: elements must be 0 or more, got {self.elements}")

    def __str__(self) -> str:
        return f"{self.kernel} {self.codec} D={self.head_dim}"
