"""The processes of `python -m benchmarks parallel`: each is a rank, and rank 0 writes a line of JSON for every row.

All are started once; for fewer ranks the first ones form a group and the others wait.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import subjects, texts
from benchmarks.caches import compressed
from benchmarks.parallel_rows import Row, empty_row
from benchmarks.results import failed
from kvcompress import CompressedCache


@dataclass(frozen=True)
class Work:
    """What the ranks do: cells are (spec, ranks) in their order. folder: where they meet, and rank 0 writes rows."""

    cells: tuple[tuple[str, int], ...]
    model: str | None
    load_in_4bit: bool
    text: Path | None
    context: int
    chunk: int
    steps: int
    seed: int
    folder: Path

    @property
    def world(self) -> int:
        return max(ranks for _, ranks in self.cells)

    @property
    def rows(self) -> Path:
        """Where rank 0 writes."""
        return self.folder / "rows.jsonl"


def run(rank: int, work: Work) -> None:
    """Be rank `rank` of all cells."""
    devices = torch.cuda.device_count()
    if devices:
        torch.cuda.set_device(rank % devices)
    else:  # gloo looks the machine's name up otherwise, which not every machine knows
        loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    backend = "nccl" if devices >= work.world else "gloo"  # NCCL takes one rank a device
    dist.init_process_group(backend, init_method=f"file://{work.folder / 'meeting'}", rank=rank, world_size=work.world)
    groups = {ranks: dist.new_group(list(range(ranks))) for ranks in sorted({ranks for _, ranks in work.cells})}
    model, tokenizer = subjects.load(work.model, work.load_in_4bit)
    model.set_attn_implementation("kvcompress")
    (ids,) = texts.load(tokenizer, work.text, work.seed).windows(1, work.context + work.steps)
    alone: dict[str, Tensor] = {}
    for spec, ranks in work.cells:
        if rank < ranks:
            row = replace(empty_row(compressed(spec), ranks), backend=backend)
            try:
                row, logits = _measured(row, work, model, ids.to(model.device), groups[ranks])
                alone.setdefault(spec, logits)
                apart = (logits - alone[spec]).abs().max() / alone[spec].abs().max()
                row = replace(row, difference=float(apart))
            except Exception as error:  # what a cache breaks by is a result to show
                row = failed(row, error)
            if rank == 0:
                with work.rows.open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
        dist.barrier()
    dist.destroy_process_group()


@torch.inference_mode()
def _measured(row: Row, work: Work, model: Any, ids: Tensor, group: Any) -> tuple[Row, Tensor]:
    """The row of a prefill and decode steps, and the last logits, float32 [V]."""
    cache = CompressedCache(model.config, row.cache, group)
    before = None
    for part in (*ids[:, : work.context].split(work.chunk, dim=1), *ids[:, work.context :].split(1, dim=1)):
        if cache.get_seq_length() == work.context:
            before = cache.stats()
        logits = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1].float()
    assert before is not None
    after, size = cache.stats(), cache.memory()
    own = torch.tensor([size.codes + size.scales, size.total], device=ids.device)
    found = [torch.empty_like(own) for _ in range(row.ranks)]
    dist.all_gather(found, own, group=group)
    pages, held = torch.stack(found).T.tolist()
    row = replace(
        row,
        tokens=cache.get_seq_length(),
        page_bytes=pages,
        held_bytes=held,
        prefill_payload=before["payload"],
        step_payload=(after["payload"] - before["payload"]) // work.steps,
        step_collectives=(after["collectives"] - before["collectives"]) // work.steps,
    )
    return row, logits
