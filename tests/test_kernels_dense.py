"""Attention over exact tokens (kernels/dense.py, merge.py, chunk.py) against a plain softmax in float64.

Run without TRITON_INTERPRET, this file runs itself under the interpreter in a process of its own, for a function that
Triton interprets cannot be compiled, and asks `python -m benchmarks static` for what the kernels compile to.

Bounds: in float32 the kernels' sums are over at most 1000 terms of size 1, so that errors are some 1e-6; in float16 the
softmax's weights are rounded, by at most 2^-11 of a mean of values of which the largest is about 4: 2e-3. The
log-sum-exp is taken of unrounded weights.
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

from kvcompress.kernels.chunk import attend_chunk
from kvcompress.kernels.dense import attend_dense, split_count
from kvcompress.kernels.merge import merge

from benchmarks.log import readable

ROOT = Path(__file__).resolve().parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FLOAT32, FLOAT16 = 1e-5, 2e-3


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(
    B: int, H: int, G: int, Q: int, T: int, D: int, DV: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        random(B, H * G, Q, D, seed=1, dtype=dtype),
        random(B, H, T, D, seed=2, dtype=dtype),
        random(B, H, T, DV, seed=3, dtype=dtype),
    )


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [B, H*G, Q, Dv], log-sum-exp [B, H*G, Q]) in float64; allowed broadcastable to [B, 1, Q, T]."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query.double() @ key.mT * SCALING
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~allowed, -torch.inf)
    if sinks is not None:
        own = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, own], dim=-1)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)[..., : key.shape[2]]
    return weights @ value, torch.logsumexp(scores, dim=-1)


SCALING = 0.11


def causal_order(Q: int, T: int) -> Tensor:
    """[Q, T]: query i sees the tokens up to T - Q + i."""
    return torch.arange(T) <= torch.arange(T - Q, T)[:, None]


def close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], bound: float) -> None:
    """Outputs within the bound, log-sum-exps within the one of float32, and minus infinity in the same places."""
    (out, lse), (good, log) = found, expected
    assert (out.double() - good).abs().max() < bound
    assert torch.equal(lse == -torch.inf, log == -torch.inf)
    assert (lse.double() - log).nan_to_num(0.0, 0.0, 0.0).abs().max() < FLOAT32
    assert not lse.isnan().any()


def merged(partials: tuple[Tensor, Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Partial results [B, H, P, G*Q, ...] as one, of the shape [B, H*G, Q, ...]; `like`: the query."""
    out, lse = merge([partials])
    return out.reshape(*like.shape[:3], -1), lse.reshape(like.shape[:3])


@dataclass(frozen=True)
class Case:
    T: int
    Q: int = 1
    G: int = 1
    D: int = 64
    DV: int = 64
    splits: int | None = None
    causal: bool = False
    softcap: float | None = None
    dtype: torch.dtype = torch.float32

    @property
    def bound(self) -> float:
        return FLOAT32 if self.dtype == torch.float32 else FLOAT16


class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.mark.parametrize(
        "case",
        [
            Case(T=1),
            Case(T=1, G=4, splits=3),  # more programs than tokens
            Case(T=63, Q=5, G=3, D=80, DV=80, causal=True),
            Case(T=111, Q=16, G=16, splits=2, causal=True),  # 256 rows: four tiles of them
            Case(T=111, Q=2, G=7, D=192, DV=128, splits=2, softcap=2.0, dtype=torch.float16),
            Case(T=111, G=4, D=96, DV=96, splits=5),
            Case(T=63, Q=3, G=2, D=256, DV=256, causal=True, dtype=torch.float16),
            Case(T=63, G=8, D=40, DV=24, softcap=30.0),
            Case(T=1000, Q=2, G=4, D=128, DV=128, causal=True, dtype=torch.float16),
        ],
        ids=str,
    )
    def test_dense(self, case: Case):
        query, key, value = inputs(2, 2, case.G, case.Q, case.T, case.D, case.DV, case.dtype)
        found = attend_dense(
            query, key, value, SCALING, case.softcap, causal=case.causal, splits=case.splits
        )  # fmt: skip
        allowed = causal_order(case.Q, case.T) if case.causal else torch.ones(case.Q, case.T, dtype=torch.bool)
        close(merged(found, query), reference(query, key, value, allowed, case.softcap), case.bound)
        assert found[0].shape[2] == (case.splits or split_count(4, case.T, 4))

    def test_dense_ranges(self):
        """Rows of their own lengths, one empty and one that claims more than there is; what lies outside is NaN."""
        query, key, value = inputs(5, 1, 2, 2, 111, 64, 64)
        first, last = torch.tensor([0, 5, 40, 64, 7]), torch.tensor([111, 70, 40, 65, 999])
        tokens = torch.arange(111)
        inside = (tokens >= first[:, None]) & (tokens < last[:, None])
        poison = [x.masked_fill(~inside[:, None, :, None], torch.nan) for x in (key, value)]
        newest = last.clamp_max(111)[:, None, None, None] - torch.arange(2, 0, -1)[:, None]
        allowed = inside[:, None, None] & (tokens <= newest)
        found = attend_dense(query, *poison, SCALING, first=first.int(), last=last.int(), causal=True, splits=2)
        close(merged(found, query), reference(query, key, value, allowed), FLOAT32)
        assert found[0][2].eq(0).all()
        assert found[1][2].eq(-torch.inf).all()

    def test_dense_mask(self):
        """Left padding and holes; tokens stand in columns of their own, of which the last row's lie outside."""
        query, key, value = inputs(4, 2, 2, 1, 63, 64, 64)
        mask = torch.rand(4, 100, generator=torch.Generator().manual_seed(4)) < 0.7
        mask[1, :60] = False
        column = torch.tensor([0, 37, 20, 70])
        where = column[:, None] + torch.arange(63)
        allowed = mask.gather(1, where.clamp_max(99)) & (where < 100)
        found = attend_dense(query, key, value, SCALING, mask=mask, column=column.int(), splits=1)
        close(merged(found, query), reference(query, key, value, allowed[:, None, None]), FLOAT32)
        found = attend_dense(query, key, value, SCALING, mask=mask[:, ::2], splits=1)  # of a step of two
        allowed = torch.cat([mask[:, ::2], torch.zeros(4, 13, dtype=torch.bool)], dim=1)  # beyond it: not seen
        close(merged(found, query), reference(query, key, value, allowed[:, None, None]), FLOAT32)

    def test_dense_strides(self):
        """Tokens before heads, dimensions before tokens, and results written into parts of larger ones."""
        query, key, value = inputs(2, 2, 2, 3, 63, 64, 64)
        apart = [query.transpose(1, 2).contiguous().transpose(1, 2), key.mT.contiguous().mT, value[:, :, :, :40]]
        means, logs = torch.full((2, 2, 5, 6, 40), torch.nan), torch.full((2, 2, 5, 6), torch.nan)
        into = means[:, :, 1:4], logs[:, :, 1:4]
        out, lse = attend_dense(*apart, SCALING, splits=3, into=into)
        assert (out.data_ptr(), lse.data_ptr()) == (into[0].data_ptr(), into[1].data_ptr())
        everything = torch.ones(3, 63, dtype=torch.bool)
        close(merged(into, query), reference(query, key, value[..., :40], everything), FLOAT32)
        assert means[:, :, [0, 4]].isnan().all()
        assert logs[:, :, [0, 4]].isnan().all()

    @pytest.mark.parametrize(("parts", "rows", "width"), [(1, 1, 16), (3, 6, 80), (37, 4, 128), (2, 200, 64)])
    def test_merge(self, parts: int, rows: int, width: int):
        means, logs = random(2, 2, parts, rows, width), 3 * random(2, 2, parts, rows, seed=1)
        logs[0, 0] = -torch.inf  # a head that saw nothing
        means[0, 0] = torch.nan  # and left its memory as it was
        whole = torch.logsumexp(logs.double(), dim=2)
        weights = torch.exp(logs - whole.unsqueeze(2)).nan_to_num(0.0)
        expected = (weights.unsqueeze(-1) * means.nan_to_num(0.0)).sum(dim=2), whole
        cut = (parts + 1) // 2
        sources = [(means[:, :, :cut], logs[:, :, :cut]), (means[:, :, cut:], logs[:, :, cut:])]
        close(merge(sources[:parts]), expected, FLOAT32)
        out = torch.empty(2, rows, 2, width, dtype=torch.float16).transpose(1, 2)
        merge([(means, logs)], dtype=torch.float16, into=(out, lse := torch.empty(2, 2, rows)))
        close((out, lse), expected, FLOAT16)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_sinks(self, dtype: torch.dtype):
        """Sinks and three sources (one with nothing to see) together are one softmax; a sink of -inf is none."""
        query, key, value = inputs(2, 2, 3, 2, 111, 64, 48)
        sinks = random(6, seed=5, dtype=dtype)
        sinks[1] = -torch.inf
        ends = [torch.full((2,), n, dtype=torch.int32) for n in (0, 50, 111)]
        ranges = [(ends[0], ends[1]), (ends[1], ends[2]), (ends[0], ends[0])]
        sources = [attend_dense(query, key, value, SCALING, first=a, last=b, splits=2) for a, b in ranges]
        out, lse = merge(sources, sinks)
        found = out.reshape(2, 6, 2, 48), lse.reshape(2, 6, 2)
        close(found, reference(query, key, value, torch.ones(2, 111, dtype=torch.bool), sinks=sinks), FLOAT32)
        out, lse = merge(sources[2:], sinks)
        assert out.eq(0).all()
        assert torch.allclose(lse.reshape(2, 6, 2), sinks.float()[:, None].expand(6, 2), atol=FLOAT32)

    @pytest.mark.parametrize(
        "case",
        [
            Case(T=1),
            Case(T=111, Q=111, G=3, D=80, DV=80),
            Case(T=300, Q=63, G=4, D=128, DV=64, dtype=torch.float16),
            Case(T=200, Q=1, G=16, D=192, DV=128, softcap=2.0),
            Case(T=65, Q=17, G=1, D=256, DV=256, dtype=torch.float16),
            Case(T=1000, Q=300, G=1, softcap=30.0, dtype=torch.float16),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("padded", [False, True])
    def test_chunk(self, case: Case, padded: bool):
        """In causal order; left padding hides all of one row's tokens but its last; beyond the tokens is NaN."""
        query, key, value = inputs(2, 2 if case.T < 1000 else 1, case.G, case.Q, case.T, case.D, case.DV, case.dtype)
        mask = torch.ones(2, case.T, dtype=torch.bool)
        if padded:
            mask[0, : case.T // 3] = False
            mask[1, : case.T - 1] = False
        longer = [
            torch.cat([x, torch.full_like(x[:, :, :1], torch.nan).expand(-1, -1, 128, -1)], 2) for x in (key, value)
        ]
        own = [x[:, :, : case.T] for x in longer]
        found = attend_chunk(query, *own, SCALING, case.softcap, mask if padded else None)
        allowed = causal_order(case.Q, case.T) & mask[:, None, None]
        close(found, reference(query, key, value, allowed, case.softcap), case.bound)

    def test_chunk_strides_and_merge(self):
        """A chunk's own tokens, transposed in memory, and earlier ones make the attention over all of them."""
        query, key, value = inputs(2, 2, 2, 20, 80, 64, 64)
        swap = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key[:, :, 60:], value[:, :, 60:])]
        into = torch.empty(2, 20, 4, 64).transpose(1, 2), torch.empty(2, 4, 20)
        out, lse = attend_chunk(*swap, SCALING, into=into)
        assert out.data_ptr() == into[0].data_ptr()
        own = out.reshape(2, 2, 1, 40, 64), lse.view(2, 2, 1, 40)
        before = attend_dense(query, key[:, :, :60], value[:, :, :60], SCALING, splits=1)
        found = [x.reshape(2, 4, 20, *x.shape[3:]) for x in merge([before, own])]
        close((found[0], found[1]), reference(query, key, value, causal_order(20, 80)), FLOAT32)

    def test_nothing_to_do(self):
        """No rows: nothing is launched. No tokens: nothing is seen."""
        query, key, value = inputs(1, 2, 2, 1, 0, 64, 64)
        out, lse = attend_dense(query, key, value, SCALING)
        assert (out.eq(0).all(), lse.eq(-torch.inf).all(), out.shape) == (True, True, (1, 2, 1, 2, 64))
        assert attend_dense(query[:0], key[:0], value[:0], SCALING)[0].shape == (0, 2, 1, 2, 64)
        assert attend_chunk(query[:0], random(0, 2, 1, 64), random(0, 2, 1, 64), SCALING)[1].shape == (0, 4, 1)
        assert merge([(out[:0], lse[:0])])[0].shape == (0, 2, 2, 64)


def test_split_count():
    """An H200 has 132 multiprocessors, two programs on each: 264 at once."""
    assert split_count(8, 1 << 20, 132) == 32  # 256 of 264: within 5% of all, and the fewest that are
    assert split_count(64, 1 << 20, 132) == 4  # 8 rows of 8 heads: 256 of 264
    assert split_count(264, 1 << 20, 132) == 1
    assert split_count(8, 1000, 132) == 3  # a program is worth its while with 256 tokens
    assert split_count(8, 10, 132) == 1
    assert split_count(1, 1 << 20, 132) == 244  # one row of one head: within 5% of 256, the most that are allowed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": random(2, 5, 1, 64)}, "query heads must be a multiple of the KV heads, got 5 and 2"),
        ({"query": random(2, 4, 1, 32)}, "key must have shape \\(2, 2, 10, 32\\), got \\(2, 2, 10, 64\\)"),
        ({"query": random(2, 4, 64)}, "query must have 4 dimensions"),
        ({"query": random(2, 4, 1, 64).double()}, "query must be one of torch.float32, .*, got torch.float64"),
        ({"key": random(2, 2, 10, 64).half()}, "key must be one of torch.float32, got torch.float16"),
        ({"value": random(2, 2, 11, 64)}, "value must have shape \\(2, 2, 10, 64\\), got \\(2, 2, 11, 64\\)"),
        ({"scaling": 0.0}, "scaling must be positive and finite, got 0.0"),
        ({"softcap": -1.0}, "softcap must be None, or positive and finite, got -1.0"),
        ({"last": torch.ones(2)}, "last must be one of torch.int32, got torch.float32"),
        ({"first": torch.ones(3, dtype=torch.int32)}, "first must have shape \\(2,\\), got \\(3,\\)"),
        ({"column": torch.ones(2, dtype=torch.int32)}, "no mask was given"),
        ({"mask": torch.ones(2, 10)}, "mask must be one of torch.bool, got torch.float32"),
        ({"mask": torch.ones(10, dtype=torch.bool)}, "mask must be \\[B, columns\\], got shape \\(10,\\)"),
        ({"splits": 0}, "splits must be at least 1, got 0"),
        ({"into": (torch.empty(2, 2, 1, 2, 64), torch.empty(2, 2, 2))}, "into\\[1\\] must have shape"),
        ({"into": (torch.empty(2, 2, 1, 64, 2).mT, torch.empty(2, 2, 1, 2))}, "contiguous in its last dimension"),
    ],
)
def test_dense_refuses(change: dict[str, object], message: str):
    query, key, value = inputs(2, 2, 2, 1, 10, 64, 64)
    good = {"query": query, "key": key, "value": value, "scaling": SCALING}
    with pytest.raises(ValueError, match=message):
        attend_dense(**(good | change))  # type: ignore[arg-type]


def test_chunk_refuses():
    query, key, value = inputs(1, 1, 1, 5, 4, 64, 64)
    with pytest.raises(ValueError, match="T >= Q"):
        attend_chunk(query, key, value, SCALING)
    with pytest.raises(ValueError, match="mask must have shape \\(1, 4\\)"):
        attend_chunk(query[:, :, :1], key, value, SCALING, mask=torch.ones(1, 5, dtype=torch.bool))


def test_merge_refuses():
    mean, log = torch.zeros(1, 2, 3, 4, 64), torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="at least one partial result"):
        merge([])
    with pytest.raises(ValueError, match="differ in P alone, got shapes"):
        merge([(mean, log), (mean[..., :32], log)])
    with pytest.raises(ValueError, match="log-sum-exps must have shape"):
        merge([(mean, log[:, :, :2])])
    with pytest.raises(ValueError, match="at least one part"):
        merge([(mean[:, :, :0], log[:, :, :0])])
    with pytest.raises(ValueError, match="one logit a query head"):
        merge([(mean, log)], torch.zeros(3))
    with pytest.raises(ValueError, match=r"into\[0\] must be one of torch\.float32, got torch\.float16"):
        merge([(mean, log)], into=(mean[:, :, 0].half(), log[:, :, 0]))


def without_interpreter() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{Path(__file__)}::TestInterpreted"]
    environment = without_interpreter() | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="interpreted functions cannot be compiled")
def test_compiled(tmp_path: Path):
    """At head_dim 128 in bfloat16 nothing spills on an H100; keys and values come straight to shared memory.

    A program that decodes takes at most half of the shared memory: two of them hide each other's waits. Other
    chips: the budgets that `python -m benchmarks static` holds.
    """
    modules = " ".join(f"kvcompress.kernels.{name}" for name in ("dense", "merge", "chunk"))
    options = ["--head-dim", "128", "--arch", "sm_90", "--module", modules, "--output", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks", "static", *options]
    subprocess.run(command, cwd=ROOT, env=without_interpreter(), capture_output=True)
    rows = readable((tmp_path / "results.jsonl").read_text().splitlines())
    assert {row["kernel"] for row in rows} == {"dense", "merge", "chunk"}
    assert [(row["constants"], row["spill_detail"]) for row in rows if row["spills"] != 0] == []
    assert [row["over_budget"] for row in rows if row["over_budget"]] == []
    decode = next(row for row in rows if row["kernel"] == "dense" and row["constants"]["BLOCK_M"] == 16)
    assert 2 * decode["shared_bytes"] <= decode["shared_limit"]
    # 8 bf16 elements of a lane's 128 bits at a time, and no other load of global memory
    loads = {name: count for name, count in decode["by_opcode"].items() if name.startswith("LDG")}
    copies = loads.pop("LDGSTS")
    assert copies * 32 * decode["num_warps"] * 8 == decode["elements"]
    assert set(loads) == {"LDGDEPBAR"}
