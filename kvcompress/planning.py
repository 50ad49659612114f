"""What would fit on a GPU (`plan`), computed from a model's config alone.

A plan needs no weights and no GPU: the model is built from its config on the meta device, its parameters are counted
there, and forward passes, which compute nothing, show what every layer of transformers' own `DynamicCache` would hold
(`tracing`, `footprint`) and what a chunk of the prompt takes on its way (`activations`). What quality the spec keeps
comes from fits to measurements (`fits`, `expectation`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvcompress.activations import chunk_bytes
from kvcompress.expectation import Expectation, expect
from kvcompress.fits import SHIPPED, Fits, Shape
from kvcompress.footprint import Footprint, Layer, coding
from kvcompress.memory import format_bytes
from kvcompress.spec import DEFAULT_SPEC, CacheSpec
from kvcompress.tracing import load_config, read_layers, trace
from kvcompress.units import parse_count, parse_size

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

GIB = 2**30
SHORTEST = 4096  # tokens: the first context of a plan's table
BOUNDLESS = 2**50  # tokens: what fits more than this many does not grow


@dataclass(frozen=True)
class PlanRow:
    """One context length in tokens: bytes of the cache for the whole batch, and whether they fit."""

    context: int
    uncompressed: int
    compressed: int
    fits_uncompressed: bool
    fits_compressed: bool


@dataclass(frozen=True)
class Plan:
    """What fits where, computed from a config; print it for the table.

    parameters: of the model; weights, activations (of a prefill chunk of `prefill_chunk` tokens in every row),
    gpu_memory, reserve: bytes; activations None where they cannot be traced, which `notes` then says. expectation: of
    quality, at the longest context. largest_*: the longest context in tokens that fits for every row of the batch,
    whatever the model was trained for; None where the cache does not grow with it.
    notes: what the numbers do not say by themselves.
    """

    model: str
    spec: CacheSpec
    batch: int
    dtype: torch.dtype
    parameters: int
    weights: int
    weight_bits: float
    gpu_memory: int
    reserve: int
    prefill_chunk: int
    activations: int | None
    layers: int
    compressed_layers: int
    rows: tuple[PlanRow, ...]
    largest_context_uncompressed: int | None
    largest_context_compressed: int | None
    expectation: Expectation
    notes: tuple[str, ...]

    def __str__(self) -> str:
        spec = str(self.spec)
        activations = "uncounted" if self.activations is None else format_bytes(self.activations)
        head = [
            f"{self.model}: {self.parameters / 1e9:,.2f} billion parameters, {self.layers} layers, "
            f"{self.compressed_layers} of them compressed with {spec}; batch {self.batch}",
            f"GPU {format_bytes(self.gpu_memory)} = weights {format_bytes(self.weights)} at {self.weight_bits:g} bits "
            f"+ reserve {format_bytes(self.reserve)} + activations {activations} of "
            f"{self.prefill_chunk:,} tokens at once + {format_bytes(max(self.cache_memory, 0))} for the cache",
            "Computed from the config, not measured.",
        ]
        return "\n".join(
            [*head, "", *self._table(), "", *(f"* {note}" for note in (*self.expectation.words, *self.notes))]
        ).rstrip()

    @property
    def cache_memory(self) -> int:
        """Bytes that are left for the cache; negative where the rest alone does not fit."""
        return self.gpu_memory - self.weights - self.reserve - (self.activations or 0)

    def _table(self) -> list[str]:
        kind = str(self.dtype).removeprefix("torch.")
        lines = [("context", f"{kind} cache", "fits", "compressed", "fits", "ratio")]
        for row in self.rows:
            ratio = f"{row.uncompressed / row.compressed:.2f}x" if row.compressed else "-"
            sizes = format_bytes(row.uncompressed), format_bytes(row.compressed)
            fits = ["yes" if fit else "no" for fit in (row.fits_uncompressed, row.fits_compressed)]
            lines.append((f"{row.context:,}", sizes[0], fits[0], sizes[1], fits[1], ratio))
        largest = [
            "any" if count is None else f"{count:,}"
            for count in (self.largest_context_uncompressed, self.largest_context_compressed)
        ]
        lines.append(("largest", largest[0], "", largest[1], "", ""))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return ["  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]


def plan(
    config_or_name: PreTrainedConfig | str | Path,
    context: int | str = 131072,
    spec: CacheSpec | str = DEFAULT_SPEC,
    gpu_memory: int | str = "80GB",
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    weight_bits: float = 16,
    reserve: int | str = 2 * GIB,
    prefill_chunk: int = 4096,
    fits: Path = SHIPPED,
) -> Plan:
    """Which context lengths fit on a GPU, uncompressed (transformers' DynamicCache) and with `spec`.

    config_or_name: a transformers config, a folder or config.json, or a Hugging Face id. context: tokens of each row
    (or "1M", see `parse_count`). gpu_memory, reserve: bytes (or "80GB", see `parse_size`). batch: rows. dtype: of the
    cache and the activations. weight_bits: bits for each parameter. prefill_chunk: tokens of each row that pass through
    the model at once, as `kvcompress.wrap` has it. fits: the file of fits that say what quality to expect, as `python
    -m benchmarks scaling` writes it.

    The numbers are computed, not measured. Weights are the exact count of parameters. The compressed size is the most
    that is held on the way to that context: sinks, window and a page (64 tokens) that fills up exactly in `dtype`, or
    as many tokens as a codec learns from where those are more, and everything before them as codes with scales and
    what was learned. That is at most a page too much in each layer and row. Layers that are not compressed count as
    transformers stores them: sliding ones up to their window, linear ones with their states, MLA latents as they are.
    Page tables (CPU memory) are left out. Activations are what is alive at the peak of one chunk (see `activations`);
    `reserve` is set aside for the CUDA context, the allocator's gaps and the workspace of attention and encoders.

    Raises ValueError for an argument out of range, a model that has no cache or cannot be traced, or a codec that does
    not support its head size; OSError where the config or the fits cannot be found.
    """
    context, gpu_memory, reserve = parse_count(context), parse_size(gpu_memory), parse_size(reserve)
    spec = CacheSpec.parse(spec)
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch must be a number of rows, 1 or more, got {batch!r}")
    if not weight_bits > 0:
        raise ValueError(f"weight_bits must be above 0, got {weight_bits!r}")
    if not isinstance(prefill_chunk, int) or prefill_chunk < 1:
        raise ValueError(f"prefill_chunk must be a number of tokens, 1 or more, got {prefill_chunk!r}")
    config, measured = load_config(config_or_name), Fits.read(fits)
    model, cache = trace(config, dtype)
    layers, notes = read_layers(cache, config)
    codings = [coding(layer, spec, index, len(layers), dtype) for index, layer in enumerate(layers)]
    footprint = Footprint(batch, tuple(layers), tuple(codings))
    parameters = sum(p.numel() for p in model.parameters())
    weights = math.ceil(parameters * weight_bits / 8)
    chunk = min(prefill_chunk, context)
    activations: int | None = None
    try:
        activations = chunk_bytes(model, config, batch, chunk)
    except ValueError as error:
        notes.append(f"activations are not counted, the reserve must hold them: {error}")
    available = gpu_memory - weights - reserve - (activations or 0)
    return Plan(
        model=str(config_or_name) if isinstance(config_or_name, str | Path) else config.model_type,
        spec=spec,
        batch=batch,
        dtype=dtype,
        parameters=parameters,
        weights=weights,
        weight_bits=weight_bits,
        gpu_memory=gpu_memory,
        reserve=reserve,
        prefill_chunk=chunk,
        activations=activations,
        layers=len(layers),
        compressed_layers=sum(coding is not None for coding in codings),
        rows=tuple(_row(footprint, tokens, available) for tokens in _contexts(context)),
        largest_context_uncompressed=_largest(lambda tokens: footprint.uncompressed(tokens) <= available),
        largest_context_compressed=_largest(lambda tokens: footprint.compressed(tokens) <= available),
        expectation=expect(spec, context, _shape(parameters, layers), measured),
        notes=(*notes, *_context_notes(config, context), *_weight_notes(available)),
    )


def _row(footprint: Footprint, tokens: int, available: int) -> PlanRow:
    sizes = footprint.uncompressed(tokens), footprint.compressed(tokens)
    return PlanRow(tokens, *sizes, *(size <= available for size in sizes))


def _shape(parameters: int, layers: list[Layer]) -> Shape | None:
    """What fits know a model by; None where no layer is compressed."""
    full = next((layer for layer in layers if layer.compressed), None)
    return None if full is None else Shape(parameters, len(layers), full.heads, full.dims)


def _context_notes(config: PreTrainedConfig, context: int) -> list[str]:
    trained = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(trained, int) and context > trained:
        return [f"the config states {trained:,} positions: beyond them memory is one question, quality another"]
    return []


def _weight_notes(available: int) -> list[str]:
    short = (
        "weights, activations and the reserve alone do not fit: a larger GPU, several, fewer weight bits or a shorter "
        "prefill chunk are needed"
    )
    return [short] if available < 0 else []


def _contexts(longest: int) -> list[int]:
    """Powers of two from SHORTEST up to `longest`, and it."""
    powers = [2**i for i in range(SHORTEST.bit_length() - 1, longest.bit_length())]
    return sorted({n for n in powers if n <= longest} | {longest})


def _largest(fits: Callable[[int], bool]) -> int | None:
    """The largest number of tokens that fits, which may be 0; None where any number does. `fits` is monotonic."""
    if fits(BOUNDLESS):
        return None
    low, high = 0, BOUNDLESS  # the answer is in low..high-1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
