"""The `triton` backend: attention and encoding on packed codes by the kernels of `kvcompress.kernels`.

A call's pieces, each a partial result that carries its log-sum-exp: codes (absorb, pages, merge, synthesis), sinks, and
the recent tokens together with the chunk's own. The last merge adds sink logits and rounds to the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import triton
from torch import Tensor

from kvcompress import page_groups
from kvcompress.addresses import AddressTable
from kvcompress.bandlayout import bands_of
from kvcompress.codecs import SIDES, Codec, Coded, Fit, within
from kvcompress.codecs.scale import LOG
from kvcompress.history import History
from kvcompress.kernels.absorb import Frames
from kvcompress.kernels.checks import DTYPES
from kvcompress.kernels.ops import (
    absorb,
    attend_chunk,
    attend_dense,
    attend_pages,
    attend_rebuilt,
    encode_side,
    merge,
    page_splits,
    text_of_bands,
    text_of_plan,
)
from kvcompress.kernels.pages import Table
from kvcompress.kernels.rebuilding import Rebuilding
from kvcompress.kernels.segments import plan, refuses
from kvcompress.offloaded import OffloadedPool
from kvcompress.parallel import ContextGroup
from kvcompress.planes import Planes
from kvcompress.record import RecordLayout
from kvcompress.reference import Mask, Scores
from kvcompress.store import PAGE

LOG2E = 1.4426950408889634
DECODE = 16  # query tokens that are attended together as in decoding
WIDEST = 256  # head_dim


class Triton:
    """See the module."""

    name = "triton"

    def unavailable(self, device: torch.device) -> str | None:
        """None on GPUs, and everywhere in Triton's interpreter."""
        if device.type == "cuda" or (device.type == "cpu" and triton.knobs.runtime.interpret):
            return None
        return f"Triton does not run on {device.type} (on a CPU only with TRITON_INTERPRET=1)"

    def rejects(self, query: Tensor, history: History | None, mask: Mask, scores: Scores) -> str | None:
        """Why the kernels cannot attend; None where they can."""
        if mask.tensor is not None and mask.tensor.ndim != 2:
            return "a mask of four dimensions"
        if not mask.causal:
            return "attention that is not causal"
        if query.dtype not in DTYPES:
            return f"queries of {query.dtype}"
        if query.shape[-1] > WIDEST:
            return f"heads of {query.shape[-1]} dimensions, at most {WIDEST} are taken"
        if history is None or not any(history.coded):
            return None
        if isinstance(history.derived, Operands):  # its codecs have been taken before, and stay
            return None
        return _refuses_codes(history)

    def attend(
        self, query: Tensor, history: History | None, key: Tensor, value: Tensor, mask: Mask, scores: Scores
    ) -> Tensor:
        """As `reference.attend`, for what `rejects` lets pass."""
        dtype = query.dtype
        if triton.knobs.runtime.interpret and dtype == torch.bfloat16:
            query, key, value = query.float(), key.float(), value.float()  # the interpreter has no bfloat16
        rows, heads = query.shape[0], key.shape[1]
        with torch.cuda.device_of(query):  # which is not the current one where layers lie on several devices
            parts = _exact(query, history, key, value, mask, scores)
            if history is not None and any(history.coded):
                parts.append(_of_all_ranks(_codes(query, history, mask, scores), parts, history.group))
            out, _ = merge(parts, scores.sinks, dtype=dtype)
        width = out.shape[-1]
        return out.view(rows, heads, -1, query.shape[2], width).flatten(1, 2).transpose(1, 2).contiguous()

    def encode(self, codec: Codec, side: int, pages: Tensor, fit: Fit) -> Coded | str:
        """As `codec.encode`, or why the kernels cannot."""
        layout = _record(codec, side, pages.shape[1], pages.dtype, pages.device)
        bands = bands_of(codec, side, layout)
        if isinstance(bands, str):
            return bands
        if triton.knobs.runtime.interpret and pages.dtype == torch.bfloat16:
            pages = pages.float()
        records = torch.zeros(len(pages), layout.page_bytes, dtype=torch.uint8, device=pages.device)
        analysis = codec.transform.analysis(fit, pages.device)
        analysis = None if analysis is None else analysis.contiguous()
        encode_side(pages.contiguous(), fit.get("mean"), analysis, records, text_of_bands(bands))
        return within(layout.views(records), f"{SIDES[side]}.")


@lru_cache(maxsize=256)
def _record(codec: Codec, side: int, heads: int, dtype: torch.dtype, device: torch.device) -> RecordLayout:
    """The record of pages that hold one side alone."""
    page = torch.zeros(1, heads, PAGE, codec.head_dim, dtype=dtype)
    page = page + torch.arange(codec.head_dim)  # something to fit to
    coded = codec.encode(page, codec.fit(page.float()))
    return RecordLayout.of({f"{SIDES[side]}.{name}": part for name, part in coded.items()})


def _refuses_codes(history: History) -> str | None:
    assert history.pool.layout is not None
    turns = history.rotation is not None and history.codecs[0].frame != "fixed"
    for side, codec in enumerate(history.codecs):
        bands = bands_of(codec, side, history.pool.layout)
        if isinstance(bands, str):
            return bands
        if reason := refuses(bands, side):
            return reason
        if turns and any(band.kind.startswith("affine") for band in bands):
            return "affine codes where keys are rebuilt and turned"
    if turns and getattr(history.rotation, "planes", None) is None:
        return "a rotary position embedding that is not made of planes"
    return None


@dataclass(frozen=True)
class Operands:
    """What of a history's codecs and fits the kernels take, for as long as the fits are these."""

    fits: tuple[Fit, ...]
    fit_of: tuple[int, ...]
    plans: tuple[str, str]  # texts of plans
    absorbing: Tensor  # [B or 1, H, D, R]
    key_mean: Tensor | None
    restoring: Tensor  # [B or 1, H or 1, R, D]
    value_mean: Tensor | None
    planes: Planes | None
    frame: str

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that the fits do not hold already."""
        rebuilt = () if "rebuilding" not in vars(self) else (self.rebuilding.first, self.rebuilding.second)
        return self.absorbing, self.restoring, *rebuilt

    @cached_property
    def rebuilding(self) -> Rebuilding:
        """How keys are rebuilt, where queries cannot absorb that."""
        assert self.planes is not None
        order = self.planes.order.long()
        halves = (self.absorbing[..., half, :].mT.half().contiguous() for half in order.chunk(2))
        turning = self.planes.order, self.planes.frequencies, self.planes.amplitudes
        mean = None if self.key_mean is None else self.key_mean.contiguous()
        return Rebuilding(*halves, mean, *turning, self.frame)

    @cached_property
    def steps(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the steps from a page's first token to its others."""
        return self.rebuilding.steps()


def operands_of(history: History, device: torch.device) -> Operands:
    known = history.derived
    if isinstance(known, Operands) and known.fits is history.fits and known.fit_of == tuple(history.fit_of):
        return known
    assert history.pool.layout is not None
    bands = [bands_of(codec, side, history.pool.layout) for side, codec in enumerate(history.codecs)]
    plans = tuple(plan(own, side) for side, own in enumerate(bands) if not isinstance(own, str))
    fits = history.row_fit(0), history.row_fit(1)
    matrices = []
    for codec, fit in zip(history.codecs, fits, strict=True):
        matrix = codec.transform.synthesis(fit, device)
        matrix = torch.eye(codec.head_dim, device=device) if matrix is None else matrix.float()
        matrices.append(matrix.expand(1, 1, *matrix.shape) if matrix.ndim == 2 else matrix)
    planes = None
    if history.rotation is not None and history.codecs[0].frame != "fixed":
        planes = history.rotation.planes.to(device)  # type: ignore[attr-defined]  # `rejects` has seen to it
    found = Operands(
        history.fits,
        tuple(history.fit_of),
        (text_of_plan(plans[0]), text_of_plan(plans[1])),
        matrices[0][..., list(plans[0].keys)].contiguous().expand(-1, history.recent[0].shape[1], -1, -1),
        fits[0].get("mean"),
        matrices[1][..., list(plans[1].values)].mT.contiguous(),
        fits[1].get("mean"),
        planes,
        history.codecs[0].frame,
    )
    history.derived = found
    return found


@lru_cache
def gains(device: torch.device) -> Tensor:
    """What the bytes of logarithmic gains stand for."""
    return LOG.decode(torch.arange(256, dtype=torch.uint8)).to(device)


@lru_cache(maxsize=4096)
def _ints(values: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 on the device; the same few come again in every layer."""
    return torch.tensor(values, dtype=torch.int32, device=device)


def _codes(query: Tensor, history: History, mask: Mask, scores: Scores) -> tuple[Tensor, Tensor]:
    """The coded tokens' part: (means [B, H, 1, G*Q, D_v], log-sum-exps [B, H, 1, G*Q])."""
    pool = history.pool
    wheres = page_groups.tables(history, pool) if isinstance(pool, OffloadedPool) else iter([history.addresses()])
    parts = [_over_table(query, history, where, mask, scores) for where in wheres if max(where.held)]
    if not parts:  # other ranks keep all pages
        rows, kv_heads, _, width = history.recent[1].shape
        none = query.new_full((rows, kv_heads, 1, query[..., 0].numel() // (rows * kv_heads)), -torch.inf).float()
        return none.new_zeros(*none.shape, width), none
    if len(parts) == 1:
        return parts[0]
    mean, log = merge(parts)
    return mean.unsqueeze(2), log.unsqueeze(2)


def _over_table(
    query: Tensor, history: History, where: AddressTable, mask: Mask, scores: Scores
) -> tuple[Tensor, Tensor]:
    """As `_codes`, for the pages that a table names."""
    table = Table(where.addresses, where.starts, where.fills, where.counts, max(where.held))
    seen = None
    if mask.tensor is not None:
        seen = mask.tensor.contiguous(), _ints(tuple(history.pads), query.device)
    operands = operands_of(history, query.device)
    heads = operands.absorbing.shape[1]
    splits = page_splits(len(query), heads, query.shape[1] // heads * query.shape[2], table.most, query.device)
    return over_codes(query, operands, table, gains(query.device), scores, seen, splits)


def _of_all_ranks(
    codes: tuple[Tensor, Tensor], exact: list[tuple[Tensor, Tensor]], group: ContextGroup | None
) -> tuple[Tensor, Tensor]:
    """A partial result over this rank's pages to that over all ranks', by one all-reduce; as it is without a group."""
    if group is None:
        return codes
    seen = torch.cat([log for _, log in exact], dim=2).logsumexp(dim=2, keepdim=True)
    mean, log = group.combine(codes[0], codes[1].unsqueeze(-1), seen.unsqueeze(-1))
    return mean, log.squeeze(-1)


def over_codes(
    query: Tensor, operands: Operands, table: Table, gains_of_bytes: Tensor, scores: Scores,
    seen: tuple[Tensor, Tensor] | None, splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Queries [B, H*G, Q, D] over pages: (means [B, H, 1, G*Q, D_v], log-sum-exps [B, H, 1, G*Q]).

    seen: as `attend_pages` takes its mask. Reads nothing of the device, so a graph can be made of it.
    """
    # queries absorb what turns a page, and its synthesis; but not what turns every token, and not thousands of queries
    absorbs = operands.planes is None or (operands.frame == "page" and query.shape[2] <= DECODE)
    over = _over_pages if absorbs else _over_rebuilt_pages
    return over(query, operands, table, gains_of_bytes, scores, seen, splits)


def _over_pages(
    query: Tensor, operands: Operands, table: Table, gains_of_bytes: Tensor, scores: Scores,
    seen: tuple[Tensor, Tensor] | None, splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `over_codes`, with queries that absorb how keys are made of codes."""
    frames = None
    if operands.planes is not None:
        turning = operands.planes.order, operands.planes.frequencies, operands.planes.amplitudes
        frames = Frames(table.starts, table.counts, table.most, PAGE // 2, *turning)
    unit = scores.scaling * (1.0 if scores.softcap is not None else LOG2E)
    absorbed = absorb(query, operands.absorbing, operands.key_mean, operands.plans[0], unit, frames)
    partial = attend_pages(absorbed, table, *operands.plans, gains_of_bytes, scores.softcap, seen, splits)
    return _synthesised(partial, operands)


def _over_rebuilt_pages(
    query: Tensor, operands: Operands, table: Table, gains_of_bytes: Tensor, scores: Scores,
    seen: tuple[Tensor, Tensor] | None, splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `over_codes`, with keys that are rebuilt and turned."""
    partial = attend_rebuilt(
        query, operands.rebuilding, operands.steps, table, *operands.plans, gains_of_bytes, scores.scaling,
        scores.softcap, seen, splits,
    )  # fmt: skip
    return _synthesised(partial, operands)


def _synthesised(partial: tuple[Tensor, Tensor], operands: Operands) -> tuple[Tensor, Tensor]:
    """Splits merged, and what values' codes stand for made values."""
    z, log = merge([partial])
    means = z @ operands.restoring
    if operands.value_mean is not None:
        means = means + operands.value_mean.unsqueeze(-2)
    return means.unsqueeze(2), log.unsqueeze(2)


def _exact(
    query: Tensor, history: History | None, key: Tensor, value: Tensor, mask: Mask, scores: Scores
) -> list[tuple[Tensor, Tensor]]:
    """The parts of sinks, and of recent tokens with the chunk's own in causal order."""
    parts = []
    rows, heads, length = query.shape[0], key.shape[1], query.shape[2]
    groups = query.shape[1] // heads
    width, before, first = 0, 0, None
    if history is not None and history.columns:
        before = history.columns
        if history.sinks:
            sinks = [x.to(query.dtype) for x in history.sink]
            last = _ints(tuple(min(n, history.sinks) for n in history.lengths), query.device)
            pads = None if mask.tensor is None else _ints(tuple(history.pads), query.device)
            own = attend_dense(query, *sinks, scores.scaling, scores.softcap, last=last, mask=mask.tensor, column=pads)
            parts.append(own)
        width = history.recent[0].shape[2]
        recent = [x.to(query.dtype) for x in history.recent]
        key, value = torch.cat([recent[0], key], dim=2), torch.cat([recent[1], value], dim=2)
        if min(history.held) < width:
            first = _ints(tuple(width - h for h in history.held), query.device)
    tokens = key.shape[2]
    seen = None if mask.tensor is None else mask.tensor[:, before - width :][:, :tokens].contiguous()
    if length <= DECODE:
        parts.append(
            attend_dense(query, key, value, scores.scaling, scores.softcap, first=first, mask=seen, causal=True)
        )
        return parts
    if first is not None:
        real = torch.arange(tokens, device=query.device) >= first.unsqueeze(1)
        seen = real if seen is None else seen & real
    out, log = attend_chunk(query, key, value, scores.scaling, scores.softcap, mask=seen)
    parts.append((out.view(rows, heads, 1, groups * length, -1), log.view(rows, heads, 1, groups * length)))
    return parts
