"""Find the tables of the additive trellis code: ``python -m benchmarks.trellis_search``.

Alternates Viterbi encoding of unit-Gaussian vectors of 128 with a linear least-squares fit of the 24 table entries,
from `STARTS` random starts, then rounds the best to bytes whose sums stay below 128 and writes
kvcompress/codecs/trellis_tables.json. Prints the mean squared error on fresh vectors beside Lloyd-Max's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.code_error import measure
from kvcompress.codecs import trellis

TARGET = Path(trellis.__file__).with_name("trellis_tables.json")
WIDTH, VECTORS, ROUNDS, STARTS, SEED = 128, 500, 40, 40, 20261122
ROUNDINGS, LARGEST = 12, 127
RESOLUTION = 1 / 146  # of the search's integers, in standard deviations


def code(u: Tensor, tables: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Windows [vectors, n] of the best streams under float tables [3, 8], and the values that they stand for."""
    values = trellis.additive_sums(tables, bits)
    levels = (values / RESOLUTION).round().to(torch.int32)
    codes = trellis.encode(u, levels, RESOLUTION * trellis.FRACTION, bits)
    found = trellis.windows(codes, bits).long()
    return found, values[found]


def refit(u: Tensor, found: Tensor, bits: int) -> Tensor:
    """Tables [3, 8] of least squared error for given windows (ridge, since the three constants are exchangeable)."""
    fields = torch.stack([f + 8 * k for k, f in enumerate(trellis.fields(found, bits))], dim=-1).flatten(0, -2)
    design = torch.zeros(len(fields), 24, dtype=torch.float64).scatter_(1, fields, 1.0)
    gram = design.mT @ design + 1e-6 * torch.eye(24, dtype=torch.float64)
    return torch.linalg.solve(gram, design.mT @ u.flatten().double()).view(3, 8).to(u.dtype)


def search(bits: int, generator: torch.Generator) -> Tensor:
    """The best float tables of all starts."""
    best, tables_of_best = float("inf"), torch.empty(0)
    for _ in range(STARTS):
        tables = torch.randn(3, 8, generator=generator, dtype=torch.float64) / 3**0.5
        for _ in range(ROUNDS):
            u = torch.randn(VECTORS, WIDTH, generator=generator, dtype=torch.float64)
            found, values = code(u, tables, bits)
            error = (u - values).square().mean().item()
            tables = refit(u, found, bits)
        if error < best:
            best, tables_of_best = error, tables
    return tables_of_best


def to_bytes(tables: Tensor, bits: int, generator: torch.Generator) -> dict[str, object]:
    """The best of ROUNDINGS roundings to bytes whose sums fit 0..LARGEST, with the step and offset that bring them
    back, refitted to what the rounded tables code.
    """
    u = torch.randn(3 * VECTORS, WIDTH, generator=generator, dtype=torch.float64)
    best, found = float("inf"), {}
    for trial in range(ROUNDINGS):
        lowest = tables.amin(dim=1, keepdim=True)
        step = (tables.amax(dim=1) - lowest.squeeze(1)).sum() / LARGEST * (1 + 0.01 * (trial % 4))
        shift = 0.5 * torch.rand(3, 1, generator=generator, dtype=torch.float64) - 0.25
        whole = ((tables - lowest) / step + shift * (trial > 0)).round().clamp_min(0)
        whole -= whole.amin(dim=1, keepdim=True)
        if whole.amax(dim=1).sum() > LARGEST:
            continue
        windows, _ = code(u, (whole + lowest.sum() / step / 3) * step, bits)
        sums = trellis.additive_sums(whole, bits)[windows].flatten()
        slope, constant = torch.linalg.lstsq(torch.stack([sums, torch.ones_like(sums)], 1), u.flatten()).solution
        _, values = code(u, (whole + constant / slope / 3) * slope, bits)
        error = (u - values).square().mean().item()
        if error < best:
            best = error
            found = {"tables": whole.long().tolist(), "step": slope.item(), "offset": -(constant / slope).item()}
    return found


def main(bits: Annotated[list[int], typer.Option(help="bit counts to search for")] = [1, 2, 3, 4]) -> None:  # noqa: B006
    """Search, write the tables, and print what they reach."""
    found = json.loads(TARGET.read_text()) if TARGET.exists() else {}
    for count in bits:
        generator = torch.Generator().manual_seed(SEED + count)
        found[str(count)] = to_bytes(search(count, generator), count, generator)
    TARGET.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    for count in bits:
        row = measure(count)
        print(f"{count} bits: additive trellis {row.trellis:.4f}, Lloyd-Max {row.lloyd:.4f}", flush=True)


if __name__ == "__main__":
    typer.run(main)
