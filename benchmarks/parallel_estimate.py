"""What a context would take on several GPUs, calculated: bytes of each, and what goes between them for a token.

Nothing here is measured; `Estimate.assumptions` says what it rests on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from benchmarks import memory_geometries
from kvcompress.activations import chunk_bytes
from kvcompress.addresses import SMALLEST
from kvcompress.footprint import coding
from kvcompress.planning import load_config
from kvcompress.spec import CacheSpec
from kvcompress.store import PAGE
from kvcompress.tracing import read_layers, trace

WIDTH = 8  # bytes of a number of an all-reduce
ADDRESS = 16  # bytes of a page in the address table on its device: address, start, fill
AGREEMENT = 40  # bytes: what ranks state of a forward pass before it


@dataclass(frozen=True)
class Machine:
    """gpus: how many. memory, bandwidth (of one GPU's memory), link (what one sends to the others): bytes, and bytes a
    second. latency: seconds of one hop of a message. weight_bits: of a parameter. By default eight H100s by data sheet,
    with a latency that is a guess.
    """

    gpus: int = 8
    memory: int = 80 * 10**9
    bandwidth: int = 3350 * 10**9
    link: int = 450 * 10**9
    latency: float = 2e-6
    weight_bits: float = 16.0

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ValueError(f"gpus must be at least 1, got {self.gpus}")
        for name in ("bandwidth", "link", "latency", "weight_bits"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class Estimate:
    """Bytes of the GPU that holds most, seconds and bytes for a decoded token, and bytes for a chunk of the prompt.

    pages, tables: its share; exact (sinks, window, an open page), learned, weights and activations are every GPU's.
    payload: handed to all-reduces; sent: of that and of the ranks' agreement, by each GPU.
    """

    geometry: str
    spec: str
    tokens: int
    chunk: int
    machine: Machine
    weights: int
    pages: int
    tables: int
    exact: int
    learned: int
    activations: int
    step_payload: int
    step_sent: int
    step_link_seconds: float
    step_read_seconds: float
    chunk_payload: int
    chunk_sent: int
    chunk_link_seconds: float

    @property
    def total(self) -> int:
        """Bytes of one GPU."""
        return self.weights + self.pages + self.tables + self.exact + self.learned + self.activations

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the numbers rest on."""
        machine = self.machine
        return (
            f"Every GPU holds all weights, at {machine.weight_bits:g} bits a parameter, and one prompt (batch 1).",
            "The cache is in bfloat16 where it is exact; pages are dealt out one by one, so a GPU has at most one more "
            "of a layer than another. Page tables in the host's memory are left out.",
            f"Activations are what is alive at the peak of a chunk of {self.chunk:,} tokens, with the payload of its "
            "all-reduce twice; what CUDA, NCCL and the allocator take for themselves is left out.",
            "An all-reduce goes around a ring: 2 (GPUs - 1) hops, in which each GPU sends 2 (GPUs - 1) / GPUs of the "
            f"payload, at {machine.link / 1e9:g} GB a second and {machine.latency * 1e6:g} microseconds a hop; the "
            "ranks' agreement before a pass takes GPUs - 1 hops. Both numbers are stated, not measured, and nothing is "
            "taken to overlap.",
            f"A token reads all weights and all of a GPU's pages once, at {machine.bandwidth / 1e9:g} GB a second: "
            "a bound from below, which leaves out the arithmetic on codes, launches and sampling.",
            "Positions beyond what the model was trained for are a question of quality, which this says nothing of.",
        )


def write(path: Path, estimates: Sequence[Estimate]) -> None:
    """All of them as JSON, with what follows from their fields."""
    found = [{**asdict(each), "total": each.total, "assumptions": each.assumptions} for each in estimates]
    path.write_text(json.dumps(found, indent=1) + "\n")


def read(path: Path) -> list[Estimate]:
    """What `write` wrote; raises OSError where there is no such file, ValueError where it holds anything else."""
    names = [field.name for field in fields(Estimate) if field.name != "machine"]
    try:
        found = json.loads(path.read_text("utf-8"))
        return [Estimate(**{name: each[name] for name in names}, machine=Machine(**each["machine"])) for each in found]
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: no estimates of `python -m benchmarks parallel`: {error!r}") from error


def estimate(geometry: str, spec: str, tokens: int, chunk: int, machine: Machine) -> Estimate:
    """For a geometry of benchmarks/geometries, or a model folder or hub id.

    Raises ValueError for one that cannot be traced, or a spec that does not go with it; OSError where there is none.
    """
    shipped = memory_geometries.FOLDER / f"{geometry}.json"
    config = load_config(shipped if shipped.exists() else geometry)
    text = config.get_text_config(decoder=True)
    model, cache = trace(config, torch.bfloat16)
    layers, _ = read_layers(cache, config)
    parsed = CacheSpec.parse(spec)
    pages = tables = exact = learned = payload = collectives = 0
    for index, layer in enumerate(layers):
        own = coding(layer, parsed, index, len(layers), torch.bfloat16)
        if own is None:
            exact += layer.held(tokens)
            continue
        count = max(tokens - own.kept, 0) // PAGE if tokens >= own.needed else 0
        mine = math.ceil(count / machine.gpus)
        pages += math.ceil(mine * own.page_bytes)
        tables += ADDRESS * max(SMALLEST, 1 << max(mine - 1, 0).bit_length())
        exact += (own.kept + PAGE) * own.token_bytes
        learned += own.fit_bytes
        payload += text.num_attention_heads * (layer.dims[1] + 1) * WIDTH
        collectives += 1
    parameters = sum(p.numel() for p in model.parameters())
    weights = math.ceil(parameters * machine.weight_bits / 8)
    hops = machine.gpus - 1

    def between(payload: int) -> tuple[int, float]:
        """Bytes that a GPU sends, and seconds, for a pass of this payload."""
        sent = math.ceil(2 * hops / machine.gpus * payload) + hops * AGREEMENT
        return sent, (2 * collectives + 1) * hops * machine.latency + sent / machine.link

    step, whole = between(payload), between(payload * chunk)
    return Estimate(
        geometry, str(parsed), tokens, chunk, machine, weights, pages, tables, exact, learned,
        chunk_bytes(model, config, 1, chunk) + 2 * payload // max(collectives, 1) * chunk,
        payload, *step, (weights + pages) / machine.bandwidth, payload * chunk, *whole,
    )  # fmt: skip
