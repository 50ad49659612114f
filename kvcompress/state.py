"""What a cache's layers hold, taken out to be written to a file, and put back into layers that hold nothing yet.

A `State` is tensors by name and facts that JSON can hold. Of a compressed layer::

    sink.SIDE, recent.SIDE    exact tokens [B, H, n, D]
    table.ids, table.fill     int32 [B, pages]; ids count the pages below from 0
    pages.SIDE.PART           the coded parts of the pages that a row names, each once, [n, H, ...]
    fit.SIDE.NAME             what was learned, [rows, H, ...]; basis.SIDE.NAME where it came from a basis file
    queries.INDEX             [H*G, n, D], kept for a fit that is still to come, each once

Of transformers' own layers: the keys and values of a sliding window, the states of linear attention, of a layer that
shares another's nothing. A layer of any other kind is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kvcompress.basis import Basis, named
from kvcompress.codecs import SIDES, within
from kvcompress.history import History
from kvcompress.store import PAGE, PageTable

if TYPE_CHECKING:
    from kvcompress.layer import CompressedLayer

TOLERANCE = 1e-3  # of its norm, between what a page is decoded to on one device and on another


@dataclass
class State:
    """Tensors by name, and facts that JSON can hold."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def basis(self) -> Basis | None:
        """What a compressed layer had been given from a basis file, on the CPU; None where it had nothing."""
        if "basis" not in self.facts:
            return None
        key, value = self.facts["basis"]
        fits = [{n: x.cpu() for n, x in within(self.tensors, f"basis.{side}.").items()} for side in SIDES]
        return Basis((key, value), (fits[0], fits[1]))


class Part(NamedTuple):
    """One thing that kinds of layers hold: how to take it out of a layer and how to put it into a new one."""

    take: Callable[[Any], State]
    put: Callable[[Any, State], None]


def take(index: int, layer: Any) -> State:
    """What layer `index` holds, its tensors contiguous on the CPU; raises ValueError for a kind that is not known."""
    kind = type(layer).__name__
    if kind not in KINDS or type(layer).__module__ not in MODULES:
        raise ValueError(
            f"layer {index} is a {kind} of {type(layer).__module__}, whose state is not known and so cannot be saved; "
            f"known are {', '.join(KINDS)}"
        )
    result = State(facts={"kind": kind})
    for part in KINDS[kind]:
        own = part.take(layer)
        result.tensors |= {name: x.detach().cpu().contiguous() for name, x in own.tensors.items()}
        result.facts |= own.facts
    return result


def put(layer: Any, state: State) -> None:
    """Make a layer that holds nothing yet hold a state; raises ValueError where that does not hold together."""
    kind, wanted = state.facts.get("kind"), type(layer).__name__
    if kind != wanted:
        raise ValueError(f"it is a {kind}, the model has a {wanted} there")
    try:
        for part in KINDS[wanted]:
            part.put(layer, state)
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"what it holds is not complete: {error!r}") from error


def _take_compressed(layer: CompressedLayer) -> State:
    layer.settle()
    result = State(facts={"record_past": layer.record_past})
    if layer.basis is not None:
        result.facts["basis"] = list(layer.basis.codecs)
        result.tensors |= named("basis", layer.basis.fits)
    history = layer.history
    if history is None or not history.lengths:
        return result
    pages = list(dict.fromkeys(history.table.ids[history.table.ids >= 0].tolist()))  # in the order of rows
    place = {page: index for index, page in enumerate(pages)} | {-1: -1}
    ids = [[place[page] for page in row] for row in history.table.ids.tolist()]
    kept = {id(q): q for q in history.queries if q.numel()}  # rows that come from one row share theirs
    order = list(kept)
    result.tensors |= {f"queries.{index}": kept[own] for index, own in enumerate(order)}
    result.tensors |= {"table.ids": torch.tensor(ids, dtype=torch.int32).view_as(history.table.ids)}
    result.tensors |= {"table.fill": history.table.fill}
    for name, pair in (("sink", history.sink), ("recent", history.recent)):
        result.tensors |= {f"{name}.{side}": x for side, x in zip(SIDES, pair, strict=True)}
    if pages:
        result.tensors |= {f"pages.{name}": x for name, x in history.pool.read(torch.tensor(pages)).items()}
    if not history.preset:
        result.tensors |= named("fit", history.fits)
    result.facts |= {
        "lengths": history.lengths,
        "pads": history.pads,
        "fit_of": history.fit_of,
        "query_of": [order.index(id(q)) if id(q) in kept else -1 for q in history.queries],
        "check": [check for check, _ in _checks(history)],
    }
    return result


def _put_compressed(layer: CompressedLayer, state: State) -> None:
    tensors, facts = state.tensors, state.facts
    layer.record_past = bool(facts["record_past"])
    if "lengths" not in facts:
        return
    recent = (tensors["recent.key"], tensors["recent.value"])
    layer.lazy_initialization(*recent)
    history = layer.history
    assert history is not None
    history.lengths, history.pads, history.fit_of = facts["lengths"], facts["pads"], facts["fit_of"]
    history.sink, history.recent = (tensors["sink.key"], tensors["sink.value"]), recent
    none = recent[0].new_empty(0, 0, 0)
    history.queries = [none if i < 0 else tensors[f"queries.{i}"] for i in facts["query_of"]]
    history.table = PageTable(tensors["table.ids"].cpu(), tensors["table.fill"].cpu())
    if not history.preset:
        history.fits = tuple(within(tensors, f"fit.{side}.") for side in SIDES)
    pages = within(tensors, "pages.")
    _validate(history, {len(part) for part in pages.values()} or {0})
    if pages:
        history.pool.write(pages)
    for side, saved, (found, norm) in zip(SIDES, facts["check"], _checks(history), strict=True):
        if not abs(saved - found) <= TOLERANCE * norm:
            raise ValueError(
                f"its {side}s are not decoded to what they were when it was saved: {found} instead of {saved}; "
                f"the codec {getattr(layer.codecs, side)} has changed"
            )


def _validate(history: History, pages: set[int]) -> None:
    """Raises ValueError where the parts of a history contradict each other. pages: how many each part has."""
    rows, heads, _, _ = history.sink[0].shape
    ids, fill = history.table.ids, history.table.fill
    listed = [len(x) for x in (history.lengths, history.pads, history.fit_of, history.queries)] + [len(ids), len(fill)]
    if set(listed) != {rows}:
        raise ValueError(f"what it holds contradicts itself: {rows} rows have sinks, others {sorted(set(listed))}")
    held = history.held
    known = min((len(x) for fit in history.fits for x in fit.values()), default=rows)
    checks = {
        "lengths": min(held) >= 0
        and min(history.pads) >= 0
        and len({n + pad for n, pad in zip(history.lengths, history.pads, strict=True)}) == 1,
        "exact tokens": all(x.shape[:3] == (rows, heads, history.sinks) for x in history.sink)
        and all(x.shape[:2] == (rows, heads) and x.shape[2] >= max(held) for x in history.recent),
        "pages": pages == {int(ids.max()) + 1 if ids.numel() else 0}
        and ids.shape == fill.shape
        and bool(((fill >= 0) & (fill <= PAGE) & ((ids >= 0) == (fill > 0))).all()),
        "fits": all(
            (0 if coded else -1) <= place < known for place, coded in zip(history.fit_of, history.coded, strict=True)
        ),
    }
    wrong = [name for name, holds in checks.items() if not holds]
    if wrong:
        raise ValueError(f"what it holds contradicts itself: {', '.join(wrong)}")


def _checks(history: History) -> list[tuple[float, float]]:
    """A weighted sum of what every row's first page is decoded to, and its norm; of keys and of values.

    A codec that has come to mean something else, or other means and bases, would not give the same sum again.
    """
    if not any(history.coded):
        return [(0.0, 0.0)] * len(SIDES)
    block = next(history.blocks(1))
    rows = (history.table.ids[:, 0] >= 0).to(block.key.device)
    sums = []
    for side in range(len(SIDES)):
        first = history.restored(block, side, history.row_fit(side))[rows].double().nan_to_num().flatten()
        weights = (
            torch.arange(first.numel(), dtype=torch.float64, device=first.device).square().cos()
        )  # as if at random
        sums.append((float(first @ weights), float(first.norm())))
    return sums


def _take_sliding(layer: Any) -> State:
    held = {"keys": layer.keys, "values": layer.values} if layer.is_initialized else {}
    return State(held, {"cumulative_length": layer.cumulative_length, "record_past": layer.record_past})


def _put_sliding(layer: Any, state: State) -> None:
    if "keys" in state.tensors:
        held = state.tensors["keys"], state.tensors["values"]
        layer.lazy_initialization(*held)
        layer.keys, layer.values = held
    layer.cumulative_length = int(state.facts["cumulative_length"])
    layer.record_past = bool(state.facts["record_past"])


def _take_linear(layer: Any) -> State:
    states = range(layer.number_of_states)
    tensors = {f"conv.{i}": layer.conv_states[i] for i in states if layer.is_conv_states_initialized[i]}
    tensors |= {f"recurrent.{i}": layer.recurrent_states[i] for i in states if layer.is_recurrent_states_initialized[i]}
    facts = {
        "has_previous_state": [layer.has_previous_state[i] for i in states],
        "conv_kernel_size": [layer.conv_kernel_size[i] for i in states],
        "record_past": layer.record_past,
    }
    return State(tensors, facts)


def _put_linear(layer: Any, state: State) -> None:
    for i in range(layer.number_of_states):
        for name, held, known in (
            ("conv", layer.conv_states, layer.is_conv_states_initialized),
            ("recurrent", layer.recurrent_states, layer.is_recurrent_states_initialized),
        ):
            if f"{name}.{i}" in state.tensors:
                held[i], known[i] = state.tensors[f"{name}.{i}"], True
        if layer.device is None and layer.is_conv_states_initialized[i]:
            layer.dtype, layer.device = layer.conv_states[i].dtype, layer.conv_states[i].device
        layer.has_previous_state[i] = bool(state.facts["has_previous_state"][i])
        layer.conv_kernel_size[i] = state.facts["conv_kernel_size"][i]
    layer.record_past = bool(state.facts["record_past"])


COMPRESSED = Part(_take_compressed, _put_compressed)
SLIDING = Part(_take_sliding, _put_sliding)
LINEAR = Part(_take_linear, _put_linear)

MODULES = ("kvcompress.layer", "transformers.cache_utils")
#: By the names of their classes, since releases of transformers differ in which they have.
KINDS: dict[str, tuple[Part, ...]] = {
    "CompressedLayer": (COMPRESSED,),
    "CompressedHybridLayer": (COMPRESSED, LINEAR),
    "DynamicSlidingWindowLayer": (SLIDING,),
    "LinearAttentionLayer": (LINEAR,),
    "LinearAttentionAndSlidingWindowAttentionLayer": (SLIDING, LINEAR),
    "DummyLayer": (),
}
