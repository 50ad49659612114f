"""Mean squared error of the scalar and trellis codes on unit Gaussians: ``python -m benchmarks.code_error``.

Vectors of WIDTH, each with its gain, as a rotated key or value is coded. The bound is that of rate-distortion theory,
4^-bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.log import open_log
from benchmarks.tables import markdown
from kvcompress.codecs.lloyd import LloydMax
from kvcompress.codecs.trellis import Trellis

WIDTH, VECTORS, SEED = 128, 4096, 20261123


@dataclass(frozen=True)
class ErrorRow:
    """Mean squared errors at a number of bits."""

    bits: int
    trellis: float
    lloyd: float
    bound: float
    status: str = "ok"

    @property
    def key(self) -> int:
        return self.bits


def measure(bits: int) -> ErrorRow:
    """The errors on fresh vectors."""
    vectors = torch.randn(1, 1, VECTORS, WIDTH, generator=torch.Generator().manual_seed(SEED))
    quantisers = Trellis(bits), LloydMax(bits)
    ours, lloyd = ((vectors - q.decode(q.encode(vectors), WIDTH)).square().mean().item() for q in quantisers)
    return ErrorRow(bits, ours, lloyd, 4.0**-bits)


def table(rows: Sequence[ErrorRow]) -> str:
    lines = [[str(row.bits), *(f"{error:.4f}" for error in (row.trellis, row.lloyd, row.bound))] for row in rows]
    return markdown(["bits", "trellis", "Lloyd-Max", "rate-distortion bound"], 4, lines)


def main(
    bits: Annotated[list[int], typer.Option(help="bit counts to measure")] = [2, 3, 4],  # noqa: B006
    output: Annotated[Path, typer.Option(help="folder whose results.jsonl the rows are added to")] = Path(
        "benchmarks/results/code_error"
    ),
) -> None:
    """Add the rows to the results, and print them."""
    log = open_log(output, "code_error", ErrorRow, {})
    for count in bits:
        row = measure(count)
        log.add(row)
        print(f"{count} bits: trellis {row.trellis:.4f}, Lloyd-Max {row.lloyd:.4f}, bound {row.bound:.4f}", flush=True)
    log.rewrite()


if __name__ == "__main__":
    typer.run(main)
