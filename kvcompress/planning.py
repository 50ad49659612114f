"""What would fit on a GPU (`plan`), computed from a model's config alone.

A plan needs no weights and no GPU: the model is built from its config on the meta device, its parameters are counted
there, and a forward pass of a few tokens, which computes nothing, shows what every layer of transformers' own
`DynamicCache` would hold.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvcompress.codecs import Geometry
from kvcompress.memory import format_bytes
from kvcompress.spec import DEFAULT_SPEC, CacheSpec, CodecSpec
from kvcompress.store import PAGE

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig

GIB = 2**30
PROBE = 3  # tokens of the forward pass on the meta device
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

    parameters: of the model; weights, gpu_memory, reserve: bytes. largest_*: the longest context in tokens that fits
    for every row of the batch, whatever the model was trained for; None where the cache does not grow with it.
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
    layers: int
    compressed_layers: int
    rows: tuple[PlanRow, ...]
    largest_context_uncompressed: int | None
    largest_context_compressed: int | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        spec = str(self.spec)
        head = [
            f"{self.model}: {self.parameters / 1e9:,.2f} billion parameters, {self.layers} layers, "
            f"{self.compressed_layers} of them compressed with {spec}; batch {self.batch}",
            f"GPU {format_bytes(self.gpu_memory)} = weights {format_bytes(self.weights)} at {self.weight_bits:g} bits "
            f"+ reserve {format_bytes(self.reserve)} + {format_bytes(max(self.cache_memory, 0))} for the cache",
            "Computed from the config, not measured.",
        ]
        return "\n".join([*head, "", *self._table(), "", *(f"* {note}" for note in self.notes)]).rstrip()

    @property
    def cache_memory(self) -> int:
        """Bytes that are left for the cache; negative where the weights alone do not fit."""
        return self.gpu_memory - self.weights - self.reserve

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
) -> Plan:
    """Which context lengths fit on a GPU, uncompressed (transformers' DynamicCache) and with `spec`.

    config_or_name: a transformers config, a folder or config.json, or a Hugging Face id. context: tokens of each row
    (or "1M", see `parse_count`). gpu_memory, reserve: bytes (or "80GB", see `parse_size`). batch: rows. dtype: of the
    cache. weight_bits: bits for each parameter.

    The numbers are computed, not measured. Weights are the exact count of parameters. The compressed size is the most
    that is held on the way to that context: sinks, window and a page (64 tokens) that fills up exactly in `dtype`, or
    as many tokens as a codec learns from where those are more, and everything before them as codes with scales and
    what was learned. That is at most a page too much in each layer and row. Layers that are not compressed count as
    transformers stores them: sliding ones up to their window, linear ones with their states, MLA latents as they are.
    Page tables (CPU memory) are left out. Activations are not counted: `reserve` is set aside for them, for logits and
    for the CUDA context, and a long prefill chunk may need more.

    Raises ValueError for an argument out of range, a model that has no cache or cannot be traced, or a codec that does
    not support its head size; OSError where the config cannot be found.
    """
    context, gpu_memory, reserve = parse_count(context), parse_size(gpu_memory), parse_size(reserve)
    spec = CacheSpec.parse(spec)
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch must be a number of rows, 1 or more, got {batch!r}")
    if not weight_bits > 0:
        raise ValueError(f"weight_bits must be above 0, got {weight_bits!r}")
    config = load_config(config_or_name)
    model, cache = _trace(config, dtype)
    layers, notes = _read_layers(cache, config)
    codings = [_coding(layer, spec, index, len(layers), dtype) for index, layer in enumerate(layers)]
    footprint = _Footprint(batch, tuple(layers), tuple(codings))
    parameters = sum(p.numel() for p in model.parameters())
    weights = math.ceil(parameters * weight_bits / 8)
    available = gpu_memory - weights - reserve
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
        layers=len(layers),
        compressed_layers=sum(coding is not None for coding in codings),
        rows=tuple(footprint.row(tokens, available) for tokens in _contexts(context)),
        largest_context_uncompressed=_largest(lambda tokens: footprint.uncompressed(tokens) <= available),
        largest_context_compressed=_largest(lambda tokens: footprint.compressed(tokens) <= available),
        notes=(*notes, *_context_notes(config, context), *_weight_notes(available)),
    )


def load_config(source: PreTrainedConfig | str | Path) -> PreTrainedConfig:
    """A copy of a config, or the config of a folder, a config.json or a Hugging Face id.

    Raises OSError where there is none (or, for an id, no network and no cached copy), ValueError for an unknown model.
    """
    from transformers import AutoConfig, PreTrainedConfig

    if isinstance(source, PreTrainedConfig):
        return copy.deepcopy(source)
    if not isinstance(source, str | Path):
        raise TypeError(f"expected a transformers config, a path or a Hugging Face id, got {type(source).__name__}")
    if isinstance(source, Path) or re.match(r"[./~]", source):
        source = str(Path(source).expanduser())
        if not Path(source).exists():
            raise OSError(f"no folder or config.json at {source!r}")
    try:
        return AutoConfig.from_pretrained(source)
    except OSError as error:
        raise OSError(
            f"cannot load a config for {source!r}, which is no folder or config.json here and could not be had from "
            f"the Hugging Face Hub: {str(error).splitlines()[0]}"
        ) from error


SIZE_UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
}


def parse_size(size: int | str) -> int:
    """Bytes of "80GB" or "79.6 GiB" (an int is bytes already): GB is 10^9, GiB 2^30; letter case does not matter.

    GPUs are sold by names such as "80GB"; such a card shows about 79 GiB, 5% more than "80GB" is here, which leaves
    room for the driver. Raises ValueError for anything else, or less than 0.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    units = {unit.lower(): factor for unit, factor in SIZE_UNITS.items()}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", size.strip().lower()) if isinstance(size, str) else None
    if match is None or match[2] not in units:
        known = ", ".join(SIZE_UNITS)
        raise ValueError(f"cannot read {size!r} as a size: expected a number and a unit ({known}), such as 80GB")
    return int(float(match[1]) * units[match[2]])


def parse_count(count: int | str) -> int:
    """Tokens of "128k" or "1M" (an int is tokens already): k is 1024 and M is 1024^2, as context lengths are given.

    Raises ValueError for anything else, or less than 1.
    """
    text = str(count).strip().lower() if isinstance(count, int | str) else ""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([km]?)", text)
    tokens = float(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2]] if match else 0
    if tokens < 1 or tokens != int(tokens):
        raise ValueError(f"cannot read {count!r} as a number of tokens: expected 1 or more, such as 131072, 128k or 1M")
    return int(tokens)


@dataclass(frozen=True)
class _Layer:
    """One layer of one row as transformers stores it: heads and head sizes (key, value), bytes a token, tokens at most
    (None: all), bytes whatever the length, and whether a compressed cache takes its place."""

    heads: int
    dims: tuple[int, int]
    token_bytes: int
    limit: int | None
    state_bytes: int
    compressed: bool

    def held(self, tokens: int) -> int:
        return self.state_bytes + self.token_bytes * (tokens if self.limit is None else min(tokens, self.limit))


@dataclass(frozen=True)
class _Coding:
    """One layer of one row in a compressed cache, at its fullest: see `kvcompress.history` for the rule."""

    sinks: int  # tokens; room is made for all of them at once
    kept: int  # tokens: sinks and window
    needed: int  # tokens that have to be there before any is coded
    token_bytes: int
    page_bytes: float
    fit_bytes: int

    def held(self, tokens: int) -> int:
        pages = max(tokens - self.kept, 0) // PAGE if tokens >= self.needed else 0
        exact = min(max(tokens, self.sinks), max(self.kept + PAGE, self.needed))  # the most at any time
        return exact * self.token_bytes + math.ceil(pages * self.page_bytes) + (self.fit_bytes if pages else 0)


@dataclass(frozen=True)
class _Footprint:
    """Bytes of a whole cache by tokens in each row; both never fall as tokens grow."""

    batch: int
    layers: tuple[_Layer, ...]
    codings: tuple[_Coding | None, ...]

    def uncompressed(self, tokens: int) -> int:
        return self.batch * sum(layer.held(tokens) for layer in self.layers)

    def compressed(self, tokens: int) -> int:
        pairs = zip(self.layers, self.codings, strict=True)
        return self.batch * sum(x.held(tokens) if c is None else c.held(tokens) + x.state_bytes for x, c in pairs)

    def row(self, tokens: int, available: int) -> PlanRow:
        sizes = self.uncompressed(tokens), self.compressed(tokens)
        return PlanRow(tokens, *sizes, *(size <= available for size in sizes))


def _coding(layer: _Layer, spec: CacheSpec, index: int, count: int, dtype: torch.dtype) -> _Coding | None:
    sides = spec.layer(index, count)  # also where it is not compressed: it checks the spec's layer numbers
    if not layer.compressed:
        return None
    costs = [
        _cost(codec, Geometry(dim, side, layer.heads), dtype)
        for side, (codec, dim) in enumerate(zip((sides.key, sides.value), layer.dims, strict=True))
    ]
    return _Coding(
        sinks=spec.sinks,
        kept=spec.sinks + spec.window,
        needed=spec.sinks + max(cost.fit_tokens for cost in costs),
        token_bytes=layer.token_bytes,
        page_bytes=PAGE * sum(cost.vector_bits for cost in costs) / 8,
        fit_bytes=sum(cost.fit_bytes for cost in costs),
    )


@dataclass(frozen=True)
class _Cost:
    vector_bits: float
    fit_tokens: int
    fit_bytes: int


def _cost(codec_spec: CodecSpec, geometry: Geometry, dtype: torch.dtype) -> _Cost:
    """What a token costs: bits of all heads' vectors, and bytes of what is learned once from `fit_tokens` tokens."""
    codec = codec_spec.build(geometry)
    first = torch.zeros(1, geometry.heads, max(codec.fit_tokens, 1), geometry.head_dim)
    fit_bytes = sum(x.nbytes for x in codec.fit(first).values())
    return _Cost(codec.bits_per_element(dtype) * geometry.head_dim * geometry.heads, codec.fit_tokens, fit_bytes)


def _trace(config: PreTrainedConfig, dtype: torch.dtype) -> tuple[torch.nn.Module, Cache]:
    """The model on the meta device, and its DynamicCache after a forward pass of PROBE tokens there."""
    from transformers import DynamicCache

    if config.is_encoder_decoder:
        raise ValueError(f"{config.model_type} is an encoder-decoder model; a plan covers decoder-only models")
    with _quiet(), torch.device("meta"), torch.no_grad():
        model = _build(config, dtype)
        cache = DynamicCache(config=config)
        try:
            model(torch.zeros(1, PROBE, dtype=torch.int64), past_key_values=cache, use_cache=True)
        except Exception as error:  # any of a model's own
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"cannot trace {config.model_type} on the meta device: {reason}") from error
    return model, cache


def _build(config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    autos: list[Any] = [AutoModelForCausalLM, AutoModelForImageTextToText]
    auto = next((auto for auto in autos if type(config) in auto._model_mapping), None)
    if auto is None:
        raise ValueError(f"{config.model_type!r} is no causal language model that this version of transformers knows")
    model = auto.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    model.set_experts_implementation("batched_mm")  # the default looks at the data, of which there is none here
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings, which are about running a model for real."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _read_layers(cache: Cache, config: PreTrainedConfig) -> tuple[list[_Layer], list[str]]:
    """The layers of a traced cache, and notes on those that are not compressed."""
    latent = getattr(config.get_text_config(decoder=True), "kv_lora_rank", None) is not None
    layers = [_read_layer(layer, latent) for layer in cache.layers]
    if not any(layer.token_bytes or layer.state_bytes for layer in layers):
        raise ValueError(f"{config.model_type} keeps no cache that a plan could count")
    stock: dict[str, int] = {}
    for layer, held in zip(cache.layers, layers, strict=True):
        if not held.compressed:
            what = _describe(layer, held)
            stock[what] = stock.get(what, 0) + 1
    return layers, [f"{count} of {len(layers)} layers {what}" for what, count in stock.items()]


def _read_layer(layer: Any, latent: bool) -> _Layer:
    from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer

    full = type(layer) in (DynamicLayer, LinearAttentionAndFullAttentionLayer)
    sides = _tensors(getattr(layer, name, None) for name in ("keys", "values"))
    states = _tensors(x for name in ("conv_states", "recurrent_states") for x in getattr(layer, name, {}).values())
    growing = [*sides, *_tensors([getattr(layer, "indexer_keys", None)])]
    return _Layer(
        heads=sides[0].shape[1] if sides else 0,
        dims=(sides[0].shape[3], sides[1].shape[3]) if sides else (0, 0),
        token_bytes=sum(x.nbytes for x in growing) // PROBE,
        limit=layer.sliding_window if getattr(layer, "is_sliding", False) else None,
        state_bytes=sum(x.nbytes for x in states),
        compressed=full and bool(sides) and not latent,
    )


def _tensors(candidates: Iterable[Any]) -> list[Tensor]:
    return [x for x in candidates if isinstance(x, Tensor)]


def _describe(layer: Any, held: _Layer) -> str:
    """What a note says of a layer that is not compressed."""
    if not held.token_bytes and not held.state_bytes:
        return "hold nothing of their own"
    if type(layer).__module__ != "transformers.cache_utils":
        return f"are of a kind of their own ({type(layer).__name__}), counted in part only: read the sizes as too small"
    if held.limit is not None:
        return f"hold at most {held.limit:,} tokens, uncompressed (sliding window)"
    if not held.token_bytes:
        return f"hold a state of {format_bytes(held.state_bytes)} a row whatever the context (linear attention)"
    return f"hold {held.heads * sum(held.dims)} numbers a token uncompressed (latents, which no codec takes yet)"


def _context_notes(config: PreTrainedConfig, context: int) -> list[str]:
    trained = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(trained, int) and context > trained:
        return [f"the config states {trained:,} positions: beyond them memory is one question, quality another"]
    return []


def _weight_notes(available: int) -> list[str]:
    short = "the weights and the reserve alone do not fit: a larger GPU, several, or fewer weight bits are needed"
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
