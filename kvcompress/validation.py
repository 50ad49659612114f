"""Whether what a file says that a compressed layer holds can be: nothing of it is believed before it is checked here.

First the facts and the exact tokens by themselves (`check_exact`), which say what codecs are to be built for; then, of
the history that was filled with them, everything that is left (`check_history`). All raise ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvcompress.codecs import SIDES, Fit, Geometry
from kvcompress.history import History
from kvcompress.record import RecordLayout
from kvcompress.shapes import Stored, described, record_of, shape_of, stored
from kvcompress.store import PAGE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from kvcompress.layer import CompressedLayer

LONGEST = 2**31 - 1  # tokens: positions are int32 for the kernels
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PAGES = 1024  # whose numbers are looked at at a time
PLACES = "places"  # the part of a page that counts a vector's dimensions (kvcompress/codecs/kvquant.py)
#: The fields of configs that bound the heads of a layer, and their width.
HEADS = ("num_attention_heads", "num_key_value_heads", "num_global_key_value_heads")
WIDTHS = ("head_dim", "global_head_dim", "v_head_dim", "kv_lora_rank", "qk_rope_head_dim")
USUAL_HEADS, USUAL_WIDTH = 128, 256  # where a config names none


def check_exact(config: PreTrainedConfig, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """The facts of a layer that holds tokens, and the shapes of those that are exact."""
    rows = len(facts["lengths"])
    for name, least in (("lengths", 0), ("pads", 0), ("fit_of", -1), ("query_of", -1)):
        own = facts[name]
        if not isinstance(own, list) or not all(type(n) is int and least <= n <= LONGEST for n in own):
            raise ValueError(f"its {name} are no list of whole numbers from {least} to {LONGEST}")
        if len(own) != rows or not rows:
            raise ValueError(f"what it holds contradicts itself: {rows} rows have lengths, {len(own)} have {name}")
    exact = [tensors[f"{part}.{side}"] for part in ("sink", "recent") for side in SIDES]
    shapes = [tuple(x.shape) for x in exact]
    if {len(shape) for shape in shapes} != {4} or {shape[0] for shape in shapes} != {rows}:
        raise ValueError(f"what it holds contradicts itself: {rows} rows have lengths, exact tokens are {shapes}")
    if {x.dtype for x in exact} - set(DTYPES) or len({x.dtype for x in exact}) > 1:
        raise ValueError(f"its exact tokens are of {', '.join(sorted({str(x.dtype) for x in exact}))}")
    if not all(bool(torch.isfinite(x).all()) for x in exact):
        raise ValueError("its exact tokens hold NaN or infinite numbers")
    heads, widest = _most(config, HEADS, USUAL_HEADS), max(_most(config, WIDTHS, USUAL_WIDTH), USUAL_WIDTH)
    if not all(0 < shape[1] <= heads and 0 < shape[3] <= widest for shape in shapes):
        raise ValueError(f"its exact tokens are {shapes}, the model has at most {heads} heads of at most {widest}")


def _most(config: PreTrainedConfig, names: tuple[str, ...], otherwise: int) -> int:
    """The largest of a config's fields that are there."""
    found = [getattr(config, name, None) for name in names]
    numbers = [n for own in found for n in (own if isinstance(own, list | tuple) else [own]) if isinstance(n, int)]
    return max(numbers, default=otherwise)


def check_history(
    layer: CompressedLayer, history: History, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> RecordLayout:
    """Everything else, its pages' numbers left out (`check_numbers`); returns what a page's record holds."""
    heads = history.sink[0].shape[1]
    sides = _stored(layer, history)
    layout = record_of(*sides)
    names = {"sink.key", "sink.value", "recent.key", "recent.value", "table.ids", "table.fill"}
    names |= {f"queries.{index}" for index in facts["query_of"] if index >= 0}
    names |= {"pages"} if any(history.coded) else set()
    if history.preset:
        names |= {f"basis.{side}.{name}" for side, fit in zip(SIDES, history.preset, strict=True) for name in fit}
    elif any(history.coded):
        names |= {f"fit.{side}.{name}" for side, own in zip(SIDES, sides, strict=True) for name in own.fit}
    if set(tensors) != names:
        missing, more = sorted(names - set(tensors)), sorted(set(tensors) - names)
        raise ValueError(f"what it holds is not complete: {missing[:3]} missing, {more[:3]} more than there should be")
    checks = {
        "lengths": min(history.held) >= 0
        and len({n + pad for n, pad in zip(history.lengths, history.pads, strict=True)}) == 1,
        "exact tokens": all(x.shape[1:3] == (heads, history.sinks) for x in history.sink)
        and all(x.shape[1:3] == (heads, max(history.held)) for x in history.recent)
        and all(a.shape[3] == b.shape[3] for a, b in zip(history.sink, history.recent, strict=True)),
        "pages": _pages_hold(history, facts, tensors, layout),
        "fits": _fits_hold(history, sides),
        "queries": _queries_hold(history),
        "check": _is_pair_of_numbers(facts["check"]),
    }
    wrong = [name for name, holds in checks.items() if not holds]
    if wrong:
        raise ValueError(f"what it holds contradicts itself: {', '.join(wrong)}")
    return layout


def check_numbers(history: History) -> None:
    """The pages' scales and other numbers: any but NaN and infinite ones, and places within a vector."""
    for name, part in history.pool.parts():
        side, *_, own = name.split(".")
        if part.is_floating_point() and not all(bool(torch.isfinite(x).all()) for x in part.split(PAGES)):
            raise ValueError(f"its pages hold NaN or infinite numbers: {name}")
        width = history.recent[SIDES.index(side)].shape[3]
        if own == PLACES and part.numel() and int(part.max()) >= width:  # a GPU would fail for the whole process
            raise ValueError(f"its pages name dimension {int(part.max())} of vectors of {width}: {name}")


def _stored(layer: CompressedLayer, history: History) -> tuple[Stored, Stored]:
    """What the codecs of keys and of values store; keys that are turned back are coded from float32."""
    turned = history.rotation is not None and history.codecs[0].frame != "fixed"
    dtypes = (torch.float32 if turned else history.recent[0].dtype, history.recent[1].dtype)
    geometries = [Geometry(x.shape[3], side, x.shape[1]) for side, x in enumerate(history.recent)]
    key = stored(layer.codecs.key, geometries[0], dtypes[0])
    return key, stored(layer.codecs.value, geometries[1], dtypes[1])


def _pages_hold(
    history: History, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], layout: RecordLayout
) -> bool:
    ids, fill = history.table.ids, history.table.fill
    if (ids.dtype, fill.dtype) != (torch.int32, torch.int32) or ids.ndim != 2 or ids.shape != fill.shape:
        return False
    if len(ids) != len(history.lengths) or not bool(((fill >= 0) & (fill <= PAGE) & (ids >= -1)).all()):
        return False
    named = ids >= 0
    if not bool((named == (fill > 0)).all()) or bool((named[:, 1:] & ~named[:, :-1]).any()):  # a row's come first
        return False
    if not any(history.coded):
        return not ids.numel()
    pages = tensors["pages"]
    return (
        facts["record"] == described(layout)
        and pages.dtype == torch.int64
        and tuple(pages.shape) == (int(ids.max()) + 1, layout.page_bytes // pages.itemsize)
    )


def _fits_hold(history: History, sides: tuple[Stored, Stored]) -> bool:
    coded = [count > 0 for count in history.coded]
    if history.preset:
        return all(place == 0 for place in history.fit_of) and all(
            _fit_holds(fit, 1, own) for fit, own in zip(history.preset, sides, strict=True)
        )
    if any((place >= 0) != own for place, own in zip(history.fit_of, coded, strict=True)):
        return False
    places = {place for place in history.fit_of if place >= 0}
    if places != set(range(len(places))):
        return False
    return not any(coded) or all(
        _fit_holds(fit, len(places), own) for fit, own in zip(history.fits, sides, strict=True)
    )


def _fit_holds(fit: Fit, rows: int, own: Stored) -> bool:
    """Whether what was learned of one side is of so many rows, as its codec learns it, and finite."""
    return (
        {name: shape_of(x) for name, x in fit.items()} == own.fit
        and all(len(x) == rows for x in fit.values())
        and all(bool(torch.isfinite(x).all()) for x in fit.values() if x.is_floating_point())
    )


def _queries_hold(history: History) -> bool:
    """[H*G, n, D], of rows that are still to be fitted."""
    _, heads, _, width = history.recent[0].shape
    return all(
        not q.numel()
        or (
            place < 0
            and q.ndim == 3
            and q.shape[0] % heads == 0
            and q.shape[1] <= history.codecs[0].fit_tokens
            and q.shape[2] == width
            and q.dtype == history.recent[0].dtype
            and bool(torch.isfinite(q).all())
        )
        for q, place in zip(history.queries, history.fit_of, strict=True)
    )


def _is_pair_of_numbers(check: object) -> bool:
    return (
        isinstance(check, list)
        and len(check) == len(SIDES)
        and all(type(n) in (int, float) and math.isfinite(n) for n in check)
    )
