"""Attention over keys that are rebuilt (kernels/restored.py, spread.py) against the same in float64.

Run without TRITON_INTERPRET, this file runs itself under the interpreter in a process of its own, as
tests/test_kernels_dense.py does.

Pages hold random codes; the codecs' own decoding says what these stand for. The bound is that of docs/design.md,
invariant 5: errors are at most twice what rounding to float16 costs where the kernel rounds: the query, the synthesis,
what codes stand for, the keys and the softmax's weights. 1e-4 is added for the products of weights and gains, which
are rounded too, by 2^-11 of a mean of values of size 1 at most, and on the whole far less.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton")

import triton
import triton.language as tl
from kvcompress.kernels.pages import Table
from kvcompress.kernels.rebuilding import Rebuilding, page_angles
from kvcompress.kernels.restored import attend_restored
from kvcompress.kernels.segments import Plan, plan

from kvcompress.bandlayout import bands_of
from kvcompress.codecs import Coded, Geometry, within
from kvcompress.codecs.scale import LOG
from kvcompress.kernels import spread, tiles
from kvcompress.record import RecordLayout
from kvcompress.spec import CodecSpec
from kvcompress.store import PAGE, SLOT_OF, SLOTS

ROOT = Path(__file__).resolve().parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SCALING, ATOL = 0.11, 1e-4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Pages:
    """Random pages [B, P] of one layer. keys, values: what their codes stand for, float32 [B, H, P * PAGE, rank], in
    the order of tokens; synthesis [1, H, D, rank] and mean [1, H, D] of keys.
    """

    records: Tensor
    table: Table
    plans: tuple[Plan, Plan]
    keys: Tensor
    values: Tensor
    synthesis: Tensor
    mean: Tensor

    @property
    def live(self) -> Tensor:
        """bool [B, P * PAGE]."""
        held = torch.arange(self.table.most) < self.table.counts[:, None]
        return ((torch.arange(PAGE) < self.table.fills[..., None]) & held[..., None]).flatten(1)

    @property
    def positions(self) -> Tensor:
        return self.table.starts[..., None] + torch.arange(PAGE)

    @classmethod
    def random(cls, spec: str, D: int, H: int, fills: list[list[int]], start: int = 5) -> Pages:
        """fills: of every row's pages, the last of which may be ragged. Gains of all tokens beyond them are not
        numbers, and addresses beyond the counts lead nowhere.
        """
        B, P = len(fills), max(map(len, fills))
        codecs = [CodecSpec.parse(spec).build(Geometry(D, side, H)) for side in (0, 1)]
        tokens = random(1, H, max(c.fit_tokens for c in codecs), D, seed=1) * torch.linspace(2, 0.2, D) + 0.5
        fits = [codec.fit(tokens) for codec in codecs]
        coded: Coded = {}
        for side, name in enumerate(("key", "value")):
            one = codecs[side].encode(tokens[:, :, :PAGE], fits[side])
            coded |= {f"{name}.{part}": scrambled(x, B * P) for part, x in one.items()}
        layout = RecordLayout.of(coded)
        decoded = [
            codec.decode(within(coded, f"{name}."), {k: v.expand(B * P, *v.shape[1:]) for k, v in fit.items()})
            .unflatten(0, (B, P)).transpose(1, 2)
            for codec, name, fit in zip(codecs, ("key", "value"), fits, strict=True)
        ]  # fmt: skip
        held = torch.zeros(B, P, dtype=torch.int32)
        for row, own in enumerate(fills):
            held[row, : len(own)] = torch.tensor(own, dtype=torch.int32)
        poison(coded, held.flatten())
        records = layout.records(coded)
        addresses = records.data_ptr() + torch.arange(B * P).view(B, P) * layout.page_bytes
        starts = start + held.cumsum(1, dtype=torch.int32) - held
        addresses[held == 0], starts[held == 0] = 8, -1
        counts = torch.tensor([len(own) for own in fills], dtype=torch.int32)
        bands = [bands_of(codec, side, layout) for side, codec in enumerate(codecs)]
        synthesis = codecs[0].transform.synthesis(fits[0], torch.device("cpu"))
        assert synthesis is not None
        return cls(
            records,
            Table(addresses, starts, held, counts, P),
            (plan(bands[0], 0), plan(bands[1], 1)),  # type: ignore[arg-type]
            decoded[0].flatten(2, 3),
            decoded[1][:, :, :, list(SLOT_OF)].flatten(2, 3),
            synthesis.expand(1, H, -1, -1),
            fits[0]["mean"],
        )


def scrambled(part: Tensor, count: int) -> Tensor:
    """`count` random pages of a part [1, H, ...]: any codes, gains about one."""
    shape = count, *part.shape[1:]
    if part.dtype == torch.float16:
        return (0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(2))).half()
    low, high = (112, 144) if part.ndim == 3 and part.shape[2] == PAGE else (0, 256)  # bytes of gains, or codes
    drawn = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return drawn


def poison(coded: Coded, fills: Tensor) -> None:
    for name, part in coded.items():
        if name.endswith(".gain"):
            tokens = torch.tensor(SLOTS if name.startswith("value") else range(PAGE))
            dead = (tokens >= fills[:, None])[:, None].expand_as(part)
            part[dead] = torch.nan if part.dtype.is_floating_point else 255


def rebuilding(pages: Pages, frame: str, neighbours: bool = False, centred: bool = True) -> Rebuilding:
    """Planes of halves with angles as models have them, or of neighbours; amplitudes as of YaRN; some do not turn."""
    D = pages.synthesis.shape[2]
    order = torch.arange(D)
    order = torch.cat([order[::2], order[1::2]]) if neighbours else order
    frequencies = 10000.0 ** (-torch.arange(D // 2) / (D // 2))
    frequencies[-2:] = 0.0
    amplitudes = torch.linspace(1.0, 1.2, D // 2)
    columns = pages.synthesis[..., list(pages.plans[0].keys)]
    first, second = (columns[:, :, own].mT.half().contiguous() for own in order.chunk(2))
    mean = pages.mean.contiguous() if centred else None
    return Rebuilding(first, second, mean, order.int(), frequencies, amplitudes, frame)


def turned(key: Tensor, own: Rebuilding, positions: Tensor) -> Tensor:
    """Keys [B, H, T, D] in the order of planes at positions [B, T]."""
    angles = positions[:, None, :, None].to(key.dtype) * own.frequencies
    cos, sin = angles.cos() * own.amplitudes, angles.sin() * own.amplitudes
    x, y = key[..., own.order.long()].chunk(2, dim=-1)
    return torch.cat([x * cos - y * sin, y * cos + x * sin], dim=-1)


def attended(
    query: Tensor, pages: Pages, own: Rebuilding, allowed: Tensor, softcap: float | None, low: bool
) -> tuple[Tensor, Tensor]:
    """(means [B, H, rows, rank], log-sum-exps [B, H, rows]) in float64; low: rounded where the kernel rounds."""

    def rounded(x: Tensor) -> Tensor:
        return x.half().double() if low else x.double()

    H = pages.keys.shape[1]
    mean = 0.0 if own.mean is None else own.mean.double().unsqueeze(2)
    key = rounded(pages.keys) @ rounded(pages.synthesis).mT + mean
    positions = pages.positions
    if own.frame == "page":
        positions = (pages.table.starts[..., None] + PAGE // 2).expand_as(positions)
    key = rounded(turned(key, own, positions.flatten(1)))
    rows = rounded(query[..., own.order.long()]).unflatten(1, (H, -1)).flatten(2, 3)
    scores = rows @ key.mT * SCALING
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~allowed[:, None, None], -torch.inf)
    top = scores.amax(dim=-1, keepdim=True)
    weights = rounded(torch.exp(scores - top).nan_to_num(0.0))
    total = weights.sum(dim=-1, keepdim=True)
    return (weights / total.clamp_min(1e-30)) @ pages.values.double(), (top + total.log()).squeeze(-1)


def check(
    pages: Pages,
    query: Tensor,
    own: Rebuilding,
    softcap: float | None = None,
    mask: tuple[Tensor, Tensor] | None = None,
    splits: int = 1,
) -> tuple[Tensor, Tensor]:
    """The kernel agrees; returns what it gave."""
    allowed = pages.live
    if mask is not None:
        columns = (pages.positions.flatten(1) + mask[1][:, None]).clamp(0, mask[0].shape[1] - 1)
        allowed = allowed & mask[0].gather(1, columns)
    good, log = attended(query, pages, own, allowed, softcap, False)
    low, rough = attended(query, pages, own, allowed, softcap, True)
    gains = LOG.decode(torch.arange(256, dtype=torch.uint8))
    keys, values = pages.plans
    out, lse = attend_restored(
        query, own, page_angles(own, pages.table), own.steps(), pages.table, keys, values, gains, SCALING, softcap,
        mask, splits,
    )  # fmt: skip
    assert out.shape == (*good.shape[:2], splits, good.shape[2], values.rank)
    whole = torch.logsumexp(lse.double(), dim=2)
    shares = torch.exp(lse.double() - whole.unsqueeze(2)).nan_to_num(0.0)
    merged = (shares.unsqueeze(-1) * out).sum(dim=2)
    assert torch.equal(whole == -torch.inf, log == -torch.inf)
    seen = log > -torch.inf
    error = (merged - good[..., list(values.values)])[seen].abs().max()
    assert error <= 2 * (low - good)[seen].abs().max() + ATOL
    assert (whole - log)[seen].abs().max() <= 2 * (rough - log)[seen].abs().max() + ATOL
    assert out[lse == -torch.inf].eq(0).all()
    return out, lse


@triton.jit
def segments_kernel(Base, Out, SEGMENT: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr):
    """One segment's tiles as `tiles` makes them and as `spread` does, for head 1: Out [4, 16 N, 64]."""
    base, r, n = tl.load(Base), tl.arange(0, 16 * N), tl.arange(0, 64)
    place = Out + r[:, None] * 64 + n[None, :]
    tl.store(place, tl.trans(tiles.key_numbers(base, 1, SEGMENT, 0, False)).to(tl.float32))
    tl.store(place + 2 * 1024 * N, tiles.value_numbers(base, 1, SEGMENT, 0, False).to(tl.float32))
    if PARTS > 1:
        keys = spread.spread_keys(base, 1, SEGMENT, 0, False, PARTS)
        tl.store(place + 1024 * N, tl.trans(keys).to(tl.float32))
    values = spread.spread_values(base, 1, SEGMENT, 0, False, PARTS)
    tl.store(place + 3 * 1024 * N, values.to(tl.float32))


class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.mark.parametrize(
        ("spec", "D", "H", "G", "Q", "fills", "splits", "frame"),
        [
            ("prerope+trellis3", 64, 1, 1, 1, [[64]], 1, "token"),
            ("prerope+spectral3", 64, 2, 4, 1, [[64, 17]], 2, "token"),
            ("prerope+spectral3", 128, 1, 2, 12, [[64, 64, 9]], 1, "token"),
            ("prerope+spectral3", 128, 1, 4, 16, [[30]], 1, "page"),
            ("prerope+trellis3", 64, 2, 4, 1, [[64, 17], [30]], 1, "page"),
            # segments of 64 and 16 dimensions, half of a chunk of planes, a split without pages
            ("prerope+trellis3", 80, 1, 2, 2, [[64, 5]], 3, "token"),
            ("prerope+lloyd4", 96, 1, 1, 4, [[64], [12]], 1, "token"),
            ("prerope+spectral4", 64, 1, 4, 1, [[64, 17]], 1, "token"),
            ("prerope+trellis3", 192, 1, 4, 2, [[9]], 1, "token"),
            ("prerope+trellis3", 256, 1, 4, 2, [[9]], 1, "page"),
        ],
    )
    def test_pages(
        self, spec: str, D: int, H: int, G: int, Q: int, fills: list[list[int]], splits: int, frame: str
    ):  # fmt: skip
        pages = Pages.random(spec, D, H, fills)
        check(pages, random(len(fills), H * G, Q, D, seed=7), rebuilding(pages, frame), splits=splits)

    def test_tiles(self):
        """70 rows: a tile of 64 and a part of one; neighbours make planes; no mean; query tokens before heads."""
        pages = Pages.random("prerope+trellis3", 64, 1, [[64, 1]])
        query = random(1, 14, 5, 64, seed=7).half().transpose(1, 2).contiguous().transpose(1, 2)
        check(pages, query, rebuilding(pages, "token", neighbours=True, centred=False))

    def test_softcap(self):
        pages = Pages.random("prerope+trellis3", 64, 1, [[64, 20]])
        check(pages, random(1, 4, 6, 64, seed=7), rebuilding(pages, "token"), softcap=1.5)

    def test_mask(self):
        """Left padding and holes; a row of which nothing is to be seen, and one without pages."""
        pages = Pages.random("prerope+trellis3", 64, 1, [[64, 40], [64], [50], []])
        mask = torch.rand(4, 200, generator=torch.Generator().manual_seed(4)) < 0.6
        mask[2] = False
        own = mask, torch.tensor([0, 70, 3, 0], dtype=torch.int32)
        _, lse = check(pages, random(4, 2, 1, 64, seed=7), rebuilding(pages, "token"), mask=own, splits=2)
        assert lse[2:].eq(-torch.inf).all()

    def test_large_queries(self):
        """Queries of 10^5, for which float16 has no number, and zero ones."""
        pages = Pages.random("prerope+trellis3", 64, 1, [[40]])
        own, query = rebuilding(pages, "token"), random(1, 1, 1, 64, seed=7)
        plain, _ = check(pages, query, own)
        gains, (keys, values) = LOG.decode(torch.arange(256, dtype=torch.uint8)), pages.plans
        angles, steps = page_angles(own, pages.table), own.steps()
        large, _ = attend_restored(
            query * 1e5, own, angles, steps, pages.table, keys, values, gains, SCALING * 1e-5
        )  # fmt: skip
        assert (large - plain).abs().max() < 1e-5
        zero, _ = attend_restored(query * 0, own, angles, steps, pages.table, keys, values, gains, SCALING)
        even = pages.values[0, 0, :40].mean(dim=0)[list(values.values)]
        assert (zero[0, 0, 0, 0] - even).abs().max() < 1e-3  # gains are rounded to float16

    def test_angles(self):
        """Of position times frequency in float32, as models have them; exact far out, where float32 has no fractions.

        float32's cosines and sines are within 2^-24, amplitudes round once more: 2e-7.
        """
        pages = Pages.random("prerope+trellis3", 64, 1, [[64, 64, 64]], start=900_000)
        for frame, middle in (("token", 0), ("page", 32)):
            own = rebuilding(pages, frame)
            angles = ((pages.table.starts[0, :, None] + middle).float() * own.frequencies).double()
            found = page_angles(own, pages.table)[0]
            expected = torch.stack([angles.cos(), angles.sin()], dim=1) * own.amplitudes
            assert (found - expected).abs().max() < 2e-7

    @pytest.mark.parametrize("PARTS", [1, 2, 4])
    @pytest.mark.parametrize(("N", "S", "S0"), [(1, 3, 1), (2, 2, 0), (4, 5, 1)])
    @pytest.mark.parametrize(
        ("spec", "bits"), [("trellis", 1), ("trellis", 3), ("trellis", 4), ("lloyd", 2), ("lloyd", 5)]
    )
    def test_spread(self, spec: str, bits: int, N: int, S: int, S0: int, PARTS: int):
        """A segment's tiles are the same whatever number of lanes share a block."""
        made = plans_of(f"{spec}{bits}", 16 * S)
        band, _, _, _, kind, _, tables, _, at, _ = made.segments[0]
        segment = band, S, S0, N, kind, bits, tables, 0, at, S
        words = torch.randint(-(2**31), 2**31, (2, S * 32 * bits), generator=torch.Generator().manual_seed(5))
        words = words.int()
        out = torch.full((4, 16 * N, 64), torch.nan)
        segments_kernel[(1,)](torch.tensor([words.data_ptr()]), out, (segment,), N, PARTS)
        assert out[0].count_nonzero() > 0
        assert torch.equal(out[0], out[1]) or PARTS == 1
        assert torch.equal(out[2], out[3])


def plans_of(spec: str, width: int) -> Plan:
    codec = CodecSpec.parse(spec).build(Geometry(width))
    page = random(1, 1, PAGE, width)
    layout = RecordLayout.of({f"key.{name}": x for name, x in codec.encode(page, codec.fit(page)).items()})
    bands = bands_of(codec, 0, layout)
    assert not isinstance(bands, str)
    return plan(bands, 0)


def test_parts():
    assert [spread.parts(blocks, 128) for blocks in (32, 64, 128, 512)] == [4, 2, 1, 1]
    assert spread.parts(32, 1) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": random(1, 3, 1, 64)}, "query heads must be a multiple of the KV heads, got 3 and 2"),
        ({"query": random(1, 2, 1, 64).double()}, "query must be \\[B, H\\*G, Q, D\\] of torch.float32"),
        ({"query": random(1, 2, 1, 32)}, "first must have shape \\(1, 2, 64, 16\\)"),
        ({"splits": 0}, "splits must be at least 1, got 0"),
        ({"angles": random(1, 2, 2, 32)}, "angles must have shape \\(1, 1, 2, 32\\)"),
        ({"frame": "fixed"}, "frame must be one of page, token, got 'fixed'"),
        ({"mean": random(2, 2, 64)}, "mean must have shape \\(1, 2, 64\\), got \\(2, 2, 64\\)"),
    ],
)
def test_refuses(change: dict[str, object], message: str):
    pages = Pages.random("prerope+trellis3", 64, 2, [[64]])
    own = rebuilding(pages, "token")
    fields = vars(own) | {name: x for name, x in change.items() if name in vars(own)}
    good = {"query": random(1, 2, 1, 64), "angles": random(1, 1, 2, 32), "splits": 1}
    good |= {name: x for name, x in change.items() if name not in vars(own)}  # type: ignore[dict-item]
    keys, values = pages.plans
    with pytest.raises(ValueError, match=message):
        attend_restored(
            rebuilding=Rebuilding(**fields), steps=own.steps(), table=pages.table, keys=keys, values=values,
            gains_of_bytes=random(256), scaling=1.0, **good,
        )  # type: ignore[arg-type]  # fmt: skip


def interpreted(which: str) -> None:
    """Run the tests that fit `which`, an expression of names, under the interpreter."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"{Path(__file__)}::TestInterpreted"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, "-k", which], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


QUICK = "softcap or angles or lloyd"


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_some_under_the_interpreter():
    interpreted(QUICK)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_the_others_under_the_interpreter():
    interpreted(f"not ({QUICK})")
