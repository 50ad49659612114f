"""The launches of this folder as `torch.library` ops of the namespace `kvcompress`, so that torch.compile traces them.

Each op has the name of what it launches. Its arguments are tensors, numbers and strings: a dataclass is given field by
field, or as a text that is parsed once (`text_of_plan`, `text_of_bands`). The number of splits is the caller's, so the
shape of what an op returns follows from shapes, numbers and the kind of device, and its fake reads no tensor.

The functions below the ops take the arguments of their namesakes. While a graph is traced they call the op; otherwise
they launch at once, which spares the host the way through the dispatcher.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import astuple
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import absorb as _absorb
from . import chunk as _chunk
from . import dense as _dense
from . import encode_side as _encode_side
from . import merge as _merge
from . import pages as _pages
from . import restored as _restored
from .absorb import Absorbed, Frames, tile_rows
from .device import describe
from .layout import BandLayout, LevelTable, TrellisTable
from .pages import Table
from .rebuilding import Rebuilding, page_angles
from .segments import UNIT, Plan

NAMESPACE = "kvcompress"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def text_of_plan(plan: Plan) -> str:
    """A plan as ops take it."""
    return repr(astuple(plan))


@lru_cache(maxsize=256)
def plan_of(text: str) -> Plan:
    """The inverse of `text_of_plan`."""
    return Plan(*ast.literal_eval(text))


@lru_cache(maxsize=256)
def text_of_bands(bands: tuple[BandLayout, ...]) -> str:
    """Bands as ops take them."""
    return repr(tuple(astuple(band) for band in bands))


@lru_cache(maxsize=256)
def bands_of_text(text: str) -> tuple[BandLayout, ...]:
    """The inverse of `text_of_bands`."""
    return tuple(_band(*fields) for fields in ast.literal_eval(text))


def _band(*fields: Any) -> BandLayout:
    *own, table = fields
    kind = {"trellis": TrellisTable, "lloyd": LevelTable}.get(own[2])
    return BandLayout(*(*own, None if kind is None else kind(*table)))


@lru_cache(maxsize=256)
def _offsets(keys: str) -> tuple[tuple[int, int, float], ...]:
    """What `absorb` is told of the bands of a plan of keys."""
    return tuple((band[4], band[5], band[3] * UNIT) for band in plan_of(keys).bands)


def _op(fake: Callable[..., Any], mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: register a launch as the op of its name, with the fake that makes results of the right shapes.

    What it gives back calls the op while a graph is traced. By the library's own functions: what
    `torch.library.custom_op` makes costs a call several times as much of the host's time.
    """

    def register(launch: Callable[..., Any]) -> Any:
        name = launch.__name__.removeprefix("_launch_")
        schema = torch.library.infer_schema(launch, mutates_args=mutates)
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
        _LIBRARY.impl(name, launch, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        op = getattr(getattr(torch.ops, NAMESPACE), name).default

        def call(*arguments: Any) -> Any:
            return op(*arguments) if torch.compiler.is_compiling() else launch(*arguments)

        return call

    return register


def _rows(query: Tensor, heads: int) -> int:
    """Query rows of a KV head, of query [B, H*G, Q, D]."""
    return query.shape[1] // heads * query.shape[2]


def _partial(query: Tensor, heads: int, splits: int, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Empty (means [B, H, splits, rows, width], log-sum-exps [B, H, splits, rows])."""
    shape = query.shape[0], heads, splits, rows
    return query.new_empty(*shape, width, dtype=torch.float32), query.new_empty(shape, dtype=torch.float32)


def _fake_absorb(
    query: Tensor, synthesis: Tensor, mean: Tensor | None, keys: str, unit: float, starts: Tensor | None,
    counts: Tensor | None, pages: int, middle: int, order: Tensor | None, frequencies: Tensor | None,
    amplitudes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    heads = synthesis.shape[1] if mean is None else mean.shape[1]
    rows = _rows(query, heads)
    tiles = -(-rows // tile_rows(rows, describe(query.device)))
    shape = query.shape[0], heads, pages
    return (
        query.new_empty(*shape, rows, synthesis.shape[3], dtype=torch.float16),
        query.new_empty(*shape, tiles, dtype=torch.float32),
        query.new_empty(*shape, 0 if mean is None else rows, dtype=torch.float32),
        query.new_empty(*shape, rows, 16, dtype=torch.float16),
    )


@_op(_fake_absorb)
def _launch_absorb(
    query: Tensor, synthesis: Tensor, mean: Tensor | None, keys: str, unit: float, starts: Tensor | None,
    counts: Tensor | None, pages: int, middle: int, order: Tensor | None, frequencies: Tensor | None,
    amplitudes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    frames = None
    if starts is not None:
        assert counts is not None
        assert order is not None
        assert frequencies is not None
        assert amplitudes is not None
        frames = Frames(starts, counts, pages, middle, order, frequencies, amplitudes)
    made = _absorb.absorb(query, synthesis, mean, _offsets(keys), unit, frames)
    return made.queries, made.scale, made.bias, made.offsets


def _fake_attend_pages(
    queries: Tensor, scale: Tensor, bias: Tensor, offsets: Tensor, per_page: bool, addresses: Tensor, starts: Tensor,
    fills: Tensor, counts: Tensor, keys: str, values: str, gains_of_bytes: Tensor, softcap: float | None,
    mask: Tensor | None, pads: Tensor | None, splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _partial(queries, queries.shape[1], splits, queries.shape[3], plan_of(values).rank)


@_op(_fake_attend_pages)
def _launch_attend_pages(
    queries: Tensor, scale: Tensor, bias: Tensor, offsets: Tensor, per_page: bool, addresses: Tensor, starts: Tensor,
    fills: Tensor, counts: Tensor, keys: str, values: str, gains_of_bytes: Tensor, softcap: float | None,
    mask: Tensor | None, pads: Tensor | None, splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    seen = None
    if mask is not None:
        assert pads is not None
        seen = mask, pads
    absorbed = Absorbed(queries, scale, bias, offsets, per_page)
    table = Table(addresses, starts, fills, counts, addresses.shape[1])
    return _pages.attend_pages(
        absorbed, table, plan_of(keys), plan_of(values), gains_of_bytes, softcap, seen, splits=splits
    )


def _fake_attend_rebuilt(
    query: Tensor, first: Tensor, second: Tensor, mean: Tensor | None, order: Tensor, frequencies: Tensor,
    amplitudes: Tensor, frame: str, cosines: Tensor, sines: Tensor, addresses: Tensor, starts: Tensor, fills: Tensor,
    counts: Tensor, most: int, keys: str, values: str, gains_of_bytes: Tensor, scaling: float, softcap: float | None,
    mask: Tensor | None, pads: Tensor | None, splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _partial(query, first.shape[1], splits, _rows(query, first.shape[1]), plan_of(values).rank)


@_op(_fake_attend_rebuilt)
def _launch_attend_rebuilt(
    query: Tensor, first: Tensor, second: Tensor, mean: Tensor | None, order: Tensor, frequencies: Tensor,
    amplitudes: Tensor, frame: str, cosines: Tensor, sines: Tensor, addresses: Tensor, starts: Tensor, fills: Tensor,
    counts: Tensor, most: int, keys: str, values: str, gains_of_bytes: Tensor, scaling: float, softcap: float | None,
    mask: Tensor | None, pads: Tensor | None, splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    seen = None
    if mask is not None:
        assert pads is not None
        seen = mask, pads
    rebuilding = Rebuilding(first, second, mean, order, frequencies, amplitudes, frame)
    table = Table(addresses, starts, fills, counts, most)
    return _restored.attend_restored(
        query, rebuilding, page_angles(rebuilding, table), (cosines, sines), table, plan_of(keys), plan_of(values),
        gains_of_bytes, scaling, softcap, seen, splits,
    )  # fmt: skip


def _fake_attend_dense(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None, first: Tensor | None,
    last: Tensor | None, mask: Tensor | None, column: Tensor | None, causal: bool, splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _partial(query, key.shape[1], splits, _rows(query, key.shape[1]), value.shape[3])


@_op(_fake_attend_dense)
def _launch_attend_dense(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None, first: Tensor | None,
    last: Tensor | None, mask: Tensor | None, column: Tensor | None, causal: bool, splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _dense.attend_dense(query, key, value, scaling, softcap, first, last, mask, column, causal, splits=splits)


def _fake_attend_chunk(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape = query.shape[:3]
    return query.new_empty(*shape, value.shape[3], dtype=torch.float32), query.new_empty(shape, dtype=torch.float32)


@_op(_fake_attend_chunk)
def _launch_attend_chunk(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _chunk.attend_chunk(query, key, value, scaling, softcap, mask)


def _fake_merge(
    means: Sequence[Tensor], logs: Sequence[Tensor], sinks: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    rows, heads, _, queries, width = means[0].shape
    return (
        means[0].new_empty(rows, heads, queries, width, dtype=dtype),
        means[0].new_empty(rows, heads, queries, dtype=torch.float32),
    )


@_op(_fake_merge)
def _launch_merge(
    means: Sequence[Tensor], logs: Sequence[Tensor], sinks: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _merge.merge(list(zip(means, logs, strict=True)), sinks, dtype)


def _fake_encode_side(x: Tensor, mean: Tensor | None, analysis: Tensor | None, records: Tensor, bands: str) -> None:
    return None


@_op(_fake_encode_side, mutates=("records",))
def _launch_encode_side(x: Tensor, mean: Tensor | None, analysis: Tensor | None, records: Tensor, bands: str) -> None:
    _encode_side.encode_side(x, mean, analysis, records, bands_of_text(bands))


def absorb(
    query: Tensor, synthesis: Tensor, mean: Tensor | None, keys: str, unit: float, frames: Frames | None = None
) -> Absorbed:
    """As `absorb.absorb`; keys: the text of the plan of the keys' bands."""
    how: tuple[Any, ...] = (None, None, 1, 0, None, None, None)
    if frames is not None:
        how = frames.starts, frames.counts, frames.pages, frames.middle
        how = (*how, frames.order, frames.frequencies, frames.amplitudes)
    queries, scale, bias, offsets = _launch_absorb(query, synthesis, mean, keys, unit, *how)
    return Absorbed(queries, scale, bias, offsets, frames is not None)


def attend_pages(
    absorbed: Absorbed, table: Table, keys: str, values: str, gains_of_bytes: Tensor, softcap: float | None,
    mask: tuple[Tensor, Tensor] | None, splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `pages.attend_pages`; keys, values: texts of plans."""
    seen, pads = (None, None) if mask is None else mask
    return _launch_attend_pages(
        absorbed.queries, absorbed.scale, absorbed.bias, absorbed.offsets, absorbed.per_page,
        table.addresses, table.starts, table.fills, table.counts, keys, values, gains_of_bytes, softcap,
        seen, pads, splits,
    )  # fmt: skip


def attend_rebuilt(
    query: Tensor, rebuilding: Rebuilding, steps: tuple[Tensor, Tensor], table: Table, keys: str, values: str,
    gains_of_bytes: Tensor, scaling: float, softcap: float | None, mask: tuple[Tensor, Tensor] | None, splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `restored.attend_restored`, with the angles of the table's pages; keys, values: texts of plans."""
    seen, pads = (None, None) if mask is None else mask
    return _launch_attend_rebuilt(
        query, rebuilding.first, rebuilding.second, rebuilding.mean, rebuilding.order, rebuilding.frequencies,
        rebuilding.amplitudes, rebuilding.frame, *steps, table.addresses, table.starts, table.fills, table.counts,
        table.most, keys, values, gains_of_bytes, scaling, softcap, seen, pads, splits,
    )  # fmt: skip


def page_splits(rows: int, heads: int, query_rows: int, pages: int, device: torch.device) -> int:
    """The splits that `pages.attend_pages` chooses for `rows` of a batch, with `query_rows` queries of a KV head."""
    chip = describe(device)
    programs = rows * heads * -(-query_rows // tile_rows(query_rows, chip))
    return _pages.split_count(programs, pages, chip.multiprocessors)


def attend_dense(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None = None, *,
    first: Tensor | None = None, last: Tensor | None = None, mask: Tensor | None = None, column: Tensor | None = None,
    causal: bool = False, splits: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `dense.attend_dense`; a traced call says the splits, since the choice asks the device."""
    if splits is None:
        heads = key.shape[1]
        splits = dense_splits(len(query), heads, _rows(query, heads), key.shape[2], query.device)
    return _launch_attend_dense(query, key, value, scaling, softcap, first, last, mask, column, causal, splits)


def dense_splits(rows: int, heads: int, query_rows: int, tokens: int, device: torch.device) -> int:
    """The splits that `dense.attend_dense` chooses; see `page_splits`."""
    chip = describe(device)
    tile = _dense.dense_config(query_rows, 1, 1, 1, chip).block_m
    return _dense.split_count(max(rows * heads * -(-query_rows // tile), 1), tokens, chip.multiprocessors)


def attend_chunk(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `chunk.attend_chunk`."""
    return _launch_attend_chunk(query, key, value, scaling, softcap, mask)


def merge(
    partials: Sequence[tuple[Tensor, Tensor]], sinks: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """As `merge.merge`."""
    return _launch_merge([mean for mean, _ in partials], [log for _, log in partials], sinks, dtype)


def encode_side(x: Tensor, mean: Tensor | None, analysis: Tensor | None, records: Tensor, bands: str) -> None:
    """As `encode_side.encode_side`; bands: their text."""
    _launch_encode_side(x, mean, analysis, records, bands)
