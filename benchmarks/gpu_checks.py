"""The kernels against the torch reference on the device: attention over codes and exact tokens, and encoding.

Attention is right where it is as near to the reference in float32 as plain attention in the model's dtype over the
decoded tokens, twice its error allowed (design.md, invariant 5). Encoding is right where its codes lose as much.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_histories import coded, empty, poison, shuffle, tokens_like
from benchmarks.gpu_rows import RefusedError, Row, Setup, attempt, ratio
from benchmarks.gpu_timer import host_seconds
from kvcompress import backends, reference
from kvcompress.history import History
from kvcompress.reference import Mask, Scores
from kvcompress.spec import CacheSpec
from kvcompress.store import PAGE

SLACK = 1e-4  # of the largest number: where attention in the model's dtype happens to be right
DISTORTION = 5e-3  # relative: of a few hundred vectors, some fall otherwise where sums in another order meet a border


@dataclass(frozen=True)
class Case:
    """pads: padding of each row, one each; cut: tokens that are dropped from the end again; queries: tokens at once."""

    spec: str
    dtype: str = "bfloat16"
    head_dim: int = 128
    heads: int = 8
    groups: int = 4
    queries: int = 1
    tokens: int = 1000
    pads: tuple[int, ...] = (0,)
    cut: int = 0
    softcap: float | None = None
    sinks: bool = False

    @property
    def name(self) -> str:
        """What differs from the plainest case."""
        plain = asdict(Case(self.spec))
        own = [f"{name}={value}" for name, value in asdict(self).items() if value != plain[name]]
        return " ".join([self.spec, *own])


#: Those that are timed first, so that they are compiled by then.
CASES = (
    Case("trellis3"),
    Case("spectral3", tokens=1500),
    Case("lloyd4"),
    Case("prerope+spectral3", tokens=1500),
    Case("trellis3", queries=300),
    Case("spectral3", queries=300, tokens=1500),
    Case("trellis3", dtype="float16", head_dim=64, heads=2, groups=1, pads=(0, 111, 63), cut=217),
    Case("trellis2", head_dim=80, heads=2, groups=8, queries=4, pads=(0, 401), cut=161),
    Case("trellis4", head_dim=192, heads=2, groups=16, sinks=True, cut=190),
    Case("trellis1", dtype="float16", head_dim=96, heads=2, groups=3, queries=3, softcap=30.0),
    Case("lloyd3", head_dim=256, heads=2, groups=2, queries=16, softcap=50.0, sinks=True),
    Case("lloyd1", dtype="float16", heads=2, queries=2, pads=(5, 0)),
    Case("lloyd2", head_dim=64, heads=2, groups=16, queries=16, cut=201),
    Case("spectral2", head_dim=96, heads=2, groups=3, queries=5, tokens=1500, pads=(0, 333), cut=209),
    Case("spectral2.5", dtype="float16", heads=2, tokens=1500, pads=(0, 700, 1), softcap=30.0),
    Case("spectral1.5", head_dim=256, heads=2, groups=1, tokens=1500, sinks=True),
    Case("spectral4", heads=2, tokens=1500, cut=150),
    Case("spectral3.5", heads=2, tokens=1500),
    Case("spectral3", head_dim=80, heads=2, groups=5, queries=16, tokens=1500),
    Case("prerope+trellis3", dtype="float16", head_dim=64, heads=2, queries=7, pads=(0, 222), cut=155),
    Case("trellis:k4v2", head_dim=64, heads=2, queries=40, pads=(0, 17)),
    Case("trellis3", heads=2, tokens=600, pads=(0, 590)),  # a row without pages beside one with
    Case("trellis3", tokens=1),
    Case("trellis3", tokens=63, pads=(0, 60), queries=9),
    Case("trellis3", tokens=111, sinks=True, queries=200),
)
DRY_CASES = (
    Case("trellis3,sinks=3,window=64", "float16", 32, 1, 2, tokens=200, pads=(0, 6), cut=75, softcap=20.0, sinks=True),
    Case("spectral3,window=448", "float16", 32, 1, 2, tokens=580),
    Case("lloyd8", "float16", 32, 1, 2, tokens=330),
)

ENCODED = (
    "trellis3", "spectral3", "lloyd4", "prerope+spectral3", "trellis1", "trellis2", "trellis4", "lloyd3", "spectral1.5",
    "spectral4", "kivi2", "kivi4",
)  # fmt: skip
DRY_ENCODED = ("lloyd4",)


def check(case: Case, base: Setup) -> Iterator[Row]:
    """The row of one case; its own sizes and dtype, on the setup's device."""
    about = {"section": "check", "name": case.name, **asdict(case)}
    yield attempt(about, lambda: _check(case, base))


def _check(case: Case, base: Setup) -> Row:
    dtype = getattr(torch, case.dtype)
    setup = replace(base, dtype=dtype, heads=case.heads, groups=case.groups, head_dim=case.head_dim)
    history = coded(setup, case.spec, len(case.pads), case.tokens, case.pads, seed=len(case.name))
    shuffle_if_coded(history)
    history.crop(case.cut)
    chunk, mask, scores = _chunk(case, setup, history)
    backend, reason = backends.choose(setup.device)
    if reason := reason or backend.rejects(chunk[0], history, mask, scores):
        raise RefusedError(reason)
    query, key, value = (x.float() for x in chunk)
    exact = reference.attend(query, history, key, value, mask, scores)
    rounded = plain(history, *chunk, mask, scores)
    poison(history)

    def attend() -> Tensor:
        return backend.attend(chunk[0], history, *chunk[1:], mask, scores)

    begun = time.perf_counter()
    out = attend()
    first = float((out.float() - exact).abs().max())  # waits for the device
    compiling = time.perf_counter() - begun
    largest = float(exact.abs().max())
    allowed = 2 * float((rounded.float() - exact).abs().max()) + SLACK * largest
    row = {"error": first, "allowed": allowed, "largest": largest, "coded_tokens": history.coded}
    row |= {"first_seconds": round(compiling, 2)}
    if not setup.dry:
        row["again_ms"] = round(host_seconds(attend, setup.device) * 1e3, 3)
    if not (math.isfinite(first) and first <= allowed):
        row |= {"status": "failed", "reason": f"off by {first:.3g}, {allowed:.3g} allowed"}
    return row


def shuffle_if_coded(history: History) -> None:
    if any(history.coded):
        shuffle(history)


def _chunk(case: Case, setup: Setup, history: History) -> tuple[tuple[Tensor, Tensor, Tensor], Mask, Scores]:
    """(query, key, value) of the case's query tokens, with its mask and scores."""
    rows = len(case.pads)
    generator = torch.Generator(setup.device).manual_seed(1)
    key, value, query = tokens_like(setup, rows, case.queries, generator, setup.groups)
    mask = None
    if any(case.pads):
        columns = torch.arange(history.columns + case.queries, device=setup.device)
        mask = columns >= torch.tensor(history.pads, device=setup.device).unsqueeze(1)
    heads = setup.heads * setup.groups
    sinks = torch.linspace(-1, 2, heads, device=setup.device).to(setup.dtype) if case.sinks else None
    return (query, key, value), Mask(mask, True), Scores(setup.scaling, case.softcap, sinks)


def plain(history: History, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scores: Scores) -> Tensor:
    """Attention over the decoded tokens in the dtype of the query, [B, Q, H*G, D]: what exact attention would lose."""
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    both = [torch.cat([history.dense(side), own], dim=2) for side, own in enumerate((key, value))]
    key, value = (x.repeat_interleave(groups, dim=1) for x in both)
    raw = query @ key.mT * scores.scaling
    if scores.softcap is not None:
        raw = torch.tanh(raw / scores.softcap) * scores.softcap
    tokens = torch.arange(key.shape[2], device=key.device)
    seen = tokens <= (key.shape[2] - length + torch.arange(length, device=key.device)).unsqueeze(1)
    allowed = seen[None, None] if mask.tensor is None else seen[None, None] & mask.tensor[:, None, None]
    raw = raw.masked_fill(~allowed, -torch.inf)
    if scores.sinks is not None:
        logits = scores.sinks.to(raw.dtype).view(1, -1, 1, 1).expand(*raw.shape[:3], 1)
        raw = torch.cat([raw, logits], dim=-1)
    weights = torch.softmax(raw, dim=-1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2)


def check_encoding(text: str, setup: Setup) -> Iterator[Row]:
    """A row for the keys' codec of a spec, and one for the values'."""
    for side, name in enumerate(("keys", "values")):
        about = {"section": "encode check", "name": f"{text} {name}", "spec": text}
        yield attempt(about, _encoding(text, side, setup))


def _encoding(text: str, side: int, setup: Setup) -> Callable[[], Row]:
    def measure() -> Row:
        codec = empty(setup, CacheSpec.parse(text)).codecs[side]
        pages = 1 if setup.dry else 12
        tokens = tokens_like(
            setup, 1, max(pages * PAGE, codec.fit_tokens), torch.Generator(setup.device).manual_seed(2)
        )
        x = tokens[side]
        fit = {name: part.contiguous() for name, part in codec.fit(x[:, :, : codec.fit_tokens]).items()}
        x = x[0, :, : pages * PAGE].unflatten(1, (pages, PAGE)).transpose(0, 1).contiguous()
        backend, reason = backends.choose(setup.device)
        ours = reason or backend.encode(codec, side, x, fit)
        if isinstance(ours, str):
            raise RefusedError(ours)
        theirs = codec.encode(x, fit)
        lost = [float((codec.restore(codec.decode(c, fit), fit) - x.float()).square().mean()) for c in (ours, theirs)]
        same = {name: float((ours[name] == part).float().mean()) for name, part in theirs.items()}
        row: dict[str, Any] = {"identical": same, "distortion": lost, "distortion_ratio": ratio(*lost)}
        if not abs(lost[0] / lost[1] - 1) <= DISTORTION:
            row |= {
                "status": "failed",
                "reason": f"the kernel's codes lose {lost[0]:.4g}, the reference's {lost[1]:.4g}",
            }
        return row

    return measure
