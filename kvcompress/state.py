"""What a cache's layers hold, taken out to be written to a file, and put back into layers that hold nothing yet.

A `State` is tensors by name and facts that JSON can hold. Of a compressed layer::

    sink.SIDE, recent.SIDE    exact tokens [B, H, n, D]
    table.ids, table.fill     int32 [B, pages]; ids count the pages below from 0
    pages                     int64 [n, page_bytes / 8], the records of the pages that a row names, each once: numbers
                              of 8 bytes, so that parts of a record are aligned where a file is mapped
    fit.SIDE.NAME             what was learned, [rows, H, ...]; basis.SIDE.NAME where it came from a basis file
    queries.INDEX             [H*G, n, D], kept for a fit that is still to come, each once

Of transformers' own layers: the keys and values of a sliding window, the states of linear attention, of a layer that
shares another's nothing. A layer of any other kind is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kvcompress import validation
from kvcompress.basis import Basis, named
from kvcompress.codecs import SIDES, within
from kvcompress.history import History
from kvcompress.shapes import described
from kvcompress.store import PagePool, PageTable

if TYPE_CHECKING:
    from kvcompress.layer import CompressedLayer

TOLERANCE = 1e-3  # of its norm, between what a page is decoded to on one device and on another
CHECKED = 16  # rows whose first page is decoded


@dataclass
class State:
    """Tensors by name, and facts that JSON can hold.

    numbers: whether those in pages are to be looked at before they are put into a layer.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    numbers: bool = True

    @property
    def basis(self) -> Basis | None:
        """What a compressed layer had been given from a basis file, on the CPU; None where it had nothing."""
        if "basis" not in self.facts:
            return None
        key, value = self.facts["basis"]
        fits = [{n: x.cpu() for n, x in within(self.tensors, f"basis.{side}.").items()} for side in SIDES]
        return Basis((key, value), (fits[0], fits[1]))


class Part(NamedTuple):
    """One thing that kinds of layers hold: how to take it out of a layer, how to put it into a new one, and how its
    tensors' names begin."""

    take: Callable[[Any], State]
    put: Callable[[Any, State], None]
    names: tuple[str, ...]


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
    names = tuple(name for part in KINDS[wanted] for name in part.names)
    more = sorted(name for name in state.tensors if not name.startswith(names))
    if more:
        raise ValueError(f"a {kind} holds no {', '.join(more[:3])}")
    try:
        for part in KINDS[wanted]:
            part.put(layer, State(within_names(state.tensors, part.names), state.facts, state.numbers))
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"what it holds is not complete: {error!r}") from error


def share(layer: Any, source: Any) -> None:
    """Make a layer that holds nothing yet hold what another does; what is never changed in place is shared.

    Raises ValueError where the layers are of different kinds, or of one that is not known.
    """
    kind = type(source).__name__
    if type(layer) is not type(source) or kind not in KINDS:
        raise ValueError(f"a {kind} cannot be shared with a {type(layer).__name__}; known are {', '.join(KINDS)}")
    for part in KINDS[kind]:
        if part is COMPRESSED:
            layer.adopt(source)
        else:
            own = part.take(source)
            part.put(layer, State({name: x.detach().clone() for name, x in own.tensors.items()}, own.facts))


def within_names(tensors: dict[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors whose names begin with one of `names`."""
    return {name: x for name, x in tensors.items() if name.startswith(names)}


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
    held = max(history.held)  # rows that had more may have left
    recent = tuple(x[:, :, x.shape[2] - held :] for x in history.recent)
    for name, pair in (("sink", history.sink), ("recent", recent)):
        result.tensors |= {f"{name}.{side}": x for side, x in zip(SIDES, pair, strict=True)}
    if pages:
        assert history.pool.layout is not None
        result.tensors["pages"] = history.pool.saved(torch.tensor(pages)).view(torch.int64)
        result.facts["record"] = described(history.pool.layout)
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
    layer.record_past = _flag(facts["record_past"])
    if layer.spec.basis not in ("prompt", "shared") and layer.basis is None:
        raise ValueError(f"its spec says basis={layer.spec.basis}, and it does not hold what that file held")
    if "lengths" not in facts:
        if any(not name.startswith("basis.") for name in tensors):
            raise ValueError(f"it says that it holds no tokens, and holds {', '.join(sorted(tensors)[:3])}")
        return
    validation.check_exact(layer.config, facts, tensors)
    recent = (tensors["recent.key"], tensors["recent.value"])
    layer.lazy_initialization(*recent)
    history = layer.history
    assert history is not None
    history.lengths, history.pads, history.fit_of = facts["lengths"], facts["pads"], facts["fit_of"]
    history.sink, history.recent = (tensors["sink.key"], tensors["sink.value"]), recent
    none = recent[0].new_empty(0, 0, 0)
    history.queries = [none if i < 0 else tensors[f"queries.{i}"] for i in facts["query_of"]]
    history.table = PageTable(tensors["table.ids"].cpu(), tensors["table.fill"].cpu())
    if not history.preset and any(history.coded):
        history.fits = tuple(within(tensors, f"fit.{side}.") for side in SIDES)
    layout = validation.check_history(layer, history, facts, tensors)
    if "pages" in tensors:
        history.pool = layer.shared.pool(recent[0].device, PagePool.of(layout, tensors["pages"].view(torch.uint8)))
    if state.numbers:
        validation.check_numbers(history)
    for side, saved, (found, norm) in zip(SIDES, facts["check"], _checks(history), strict=True):
        if not abs(saved - found) <= TOLERANCE * norm:
            raise ValueError(
                f"its {side}s are not decoded to what they were when it was saved: {found} instead of {saved}; "
                f"the codec {getattr(layer.codecs, side)} has changed"
            )


def _checks(history: History) -> list[tuple[float, float]]:
    """A weighted sum of what the first CHECKED rows' first pages are decoded to, and its norm; of keys and of values.

    A codec that has come to mean something else, or other means and bases, would not give the same sum again.
    """
    if not any(history.coded):
        return [(0.0, 0.0)] * len(SIDES)
    if len(history.lengths) > CHECKED:
        history = copy.copy(history)
        history.select(torch.arange(CHECKED))
    block = next(history.blocks(1), None)
    if block is None:
        return [(0.0, 0.0)] * len(SIDES)
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
    facts = {"cumulative_length": layer.cumulative_length, "record_past": layer.record_past, "window": _shapes(held)}
    return State(held, facts)


def _shapes(tensors: dict[str, Tensor]) -> dict[str, list[Any]]:
    """Dtypes and shapes as JSON holds them: what only the model could say better."""
    return {name: [str(x.dtype), list(x.shape)] for name, x in tensors.items()}


def _put_sliding(layer: Any, state: State) -> None:
    tokens, layer.record_past = state.facts["cumulative_length"], _flag(state.facts["record_past"])
    if type(tokens) is not int or not 0 <= tokens <= validation.LONGEST or bool(tokens) != bool(state.tensors):
        raise ValueError(f"it says that it has seen {tokens!r} tokens")
    if tokens:
        key, value = state.tensors["keys"], state.tensors["values"]
        if state.facts["window"] != _shapes(state.tensors):
            raise ValueError("its window is of other dtypes or shapes than it says")
        least = min(tokens, layer.sliding_window - 1)
        most = tokens if layer.record_past or layer.sliding_window == 1 else least
        if key.ndim != 4 or key.shape[:3] != value.shape[:3] or key.dtype != value.dtype or value.ndim != 4:
            raise ValueError(f"its keys {tuple(key.shape)} and values {tuple(value.shape)} are not of the same tokens")
        if not least <= key.shape[2] <= most:
            raise ValueError(f"it holds {key.shape[2]} tokens, after {tokens} a window has {least} to {most}")
        _check_numbers(key, value)
        layer.lazy_initialization(key, value)
        layer.keys, layer.values = key, value
    layer.cumulative_length = tokens


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"it says {value!r} where true or false is due")
    return value


def _check_numbers(*tensors: Tensor) -> None:
    for x in tensors:
        if x.dtype not in validation.DTYPES or not bool(torch.isfinite(x).all()):
            raise ValueError(f"it holds {x.dtype} or numbers that are not finite, where finite ones are due")


def _take_linear(layer: Any) -> State:
    states = range(layer.number_of_states)
    tensors = {f"conv.{i}": layer.conv_states[i] for i in states if layer.is_conv_states_initialized[i]}
    tensors |= {f"recurrent.{i}": layer.recurrent_states[i] for i in states if layer.is_recurrent_states_initialized[i]}
    facts = {
        "has_previous_state": [layer.has_previous_state[i] for i in states],
        "conv_kernel_size": [layer.conv_kernel_size[i] for i in states],
        "record_past": layer.record_past,
        "states": _shapes(tensors),
    }
    return State(tensors, facts)


def _put_linear(layer: Any, state: State) -> None:
    layer.record_past = _flag(state.facts["record_past"])
    if state.facts["states"] != _shapes(state.tensors):
        raise ValueError("its states of linear attention are of other dtypes or shapes than it says")
    for i in range(layer.number_of_states):
        for name, held, known in (
            ("conv", layer.conv_states, layer.is_conv_states_initialized),
            ("recurrent", layer.recurrent_states, layer.is_recurrent_states_initialized),
        ):
            if f"{name}.{i}" in state.tensors:
                held[i], known[i] = state.tensors[f"{name}.{i}"], True
                _check_numbers(held[i])
        size = state.facts["conv_kernel_size"][i]
        if layer.is_conv_states_initialized[i]:
            width = layer.conv_states[i].shape[-1]
            if type(size) is not int or not 0 < size <= width or (size < width and not layer.record_past):
                raise ValueError(f"it says that the last {size!r} of {width} states are needed")
            if layer.device is None:
                layer.dtype, layer.device = layer.conv_states[i].dtype, layer.conv_states[i].device
        elif size is not None:
            raise ValueError(f"it says that the last {size!r} of no states are needed")
        layer.has_previous_state[i] = _flag(state.facts["has_previous_state"][i])
        layer.conv_kernel_size[i] = size


COMPRESSED = Part(
    _take_compressed, _put_compressed, ("sink.", "recent.", "table.", "pages", "fit.", "basis.", "queries.")
)
SLIDING = Part(_take_sliding, _put_sliding, ("keys", "values"))
LINEAR = Part(_take_linear, _put_linear, ("conv.", "recurrent."))

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
