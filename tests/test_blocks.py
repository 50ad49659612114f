"""A server's blocks of codes (kvcompress/paged, kvcompress/vllm/settings.py) against dense attention; no vLLM.

What needs the kernels runs in a process of its own under Triton's interpreter, as in tests/test_kernels_dense.py.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from coded_histories import Chunk, check, expected
from torch import Tensor

from kvcompress import backends
from kvcompress.basis import Basis, save
from kvcompress.codecs import Geometry
from kvcompress.paged import codecs
from kvcompress.paged.attention import BlockAttention
from kvcompress.paged.blocks import BlockHistory, BlockLayout, BlockTable
from kvcompress.paged.rows import Step
from kvcompress.records import TokenCodec
from kvcompress.reference import Mask, Scores
from kvcompress.spec import CacheSpec, LayerSpec
from kvcompress.store import PAGE
from kvcompress.vllm import register, settings

ROOT = Path(__file__).resolve().parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
D, H, G = 64, 2, 2
LENGTHS, IDS = (130, 64, 5), torch.tensor([[7, 3, 11], [2, 0, 0], [9, 0, 0]])


def layout(spec: str) -> BlockLayout:
    own = LayerSpec.parse(spec) if "=" not in spec else CacheSpec.parse(spec).layer(0, 1)
    return BlockLayout(
        TokenCodec.of(own.key, Geometry(D, 0, H)),
        TokenCodec.of(own.value, Geometry(D, 1, H)),
    )


def blocks_of(own: BlockLayout, count: int = 12, fill: int = 255) -> Tensor:
    """Bytes of 255 are codes of something, and scales that are no numbers."""
    return torch.full((count, H * PAGE * (own.key.size + own.value.size)), fill, dtype=torch.uint8)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def coded(own: TokenCodec, x: Tensor) -> Tensor:
    """Vectors [T, H, D] as their records stand for them."""
    return own.decode(own.encode(x)) if len(x) else x


def tokens(lengths: tuple[int, ...], ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """Keys and values [tokens, H, D] of all rows one after the other, and their slots."""
    slots = [int(ids[row, t // PAGE]) * PAGE + t % PAGE for row, n in enumerate(lengths) for t in range(n)]
    return [normal(len(slots), H, D, seed=seed) for seed in (1, 2)], torch.tensor(slots)


def dense(query: Tensor, key: Tensor, value: Tensor, scores: Scores, window: int | None = None) -> Tensor:
    """The last tokens' queries [Q, H*G, D] over keys and values [T, H, D], by the formula: [Q, H*G, D]."""
    key, value = (x.repeat_interleave(G, dim=1).double().transpose(0, 1) for x in (key, value))
    raw = query.double().transpose(0, 1) @ key.mT * scores.scaling
    raw = raw if scores.softcap is None else scores.softcap * torch.tanh(raw / scores.softcap)
    place = torch.arange(key.shape[1])
    own = place[-len(query) :].unsqueeze(1)
    seen = (place <= own) & (place > own - (window or len(place)))
    raw = raw.masked_fill(~seen, -torch.inf)
    if scores.sinks is not None:
        raw = torch.cat([raw, scores.sinks.double().view(-1, 1, 1).expand(-1, len(query), 1)], dim=-1)
    return (raw.softmax(dim=-1)[..., : key.shape[1]] @ value).transpose(0, 1).float()


@pytest.mark.parametrize("spec", ["trellis3", "key=lloyd5,value=kivi2", "key=fp8,value=turboquant3", "exact"])
def test_writing_in_any_order(spec: str) -> None:
    """Tokens in random order, some calls of one, land in their slots; blocks hold no byte that is not theirs."""
    own = layout(spec)
    (key, value), slots = tokens(LENGTHS, IDS)
    blocks, at_once = blocks_of(own), blocks_of(own)
    assert own.record.page_bytes == blocks.shape[1]  # nothing is lost to alignment
    own.write(at_once, key, value, slots)
    order = list(range(len(slots)))
    random.Random(0).shuffle(order)
    for start in range(0, len(order), 13):
        part = torch.tensor(order[start : start + 13])
        own.write(
            blocks, *(torch.cat([x[part], x[:1]]) for x in (key, value)), torch.cat([slots[part], slots[:1] * 0 - 1])
        )
    assert torch.equal(blocks, at_once)
    untouched = [i for i in range(len(blocks)) if i not in (7, 3, 11, 2, 9)]
    assert bool((blocks[untouched] == 255).all())
    query, new = normal(3, H * G, 1, D, seed=3), [normal(3, H, 1, D, seed=seed) for seed in (4, 5)]
    history = BlockHistory(own, blocks, BlockTable(IDS, LENGTHS), new[0], None)
    scores = Scores(0.125)
    out = backends.attend(query, history, *new, Mask(None, True), scores, Counter())
    for row, (k, v) in enumerate(zip(key.split(LENGTHS), value.split(LENGTHS), strict=True)):
        both = [
            torch.cat([coded(c, x), n[row].transpose(0, 1)]) for c, x, n in zip(own.codecs, (k, v), new, strict=True)
        ]
        # float32 sums of up to 131 terms of size 1 against float64's
        torch.testing.assert_close(out[row], dense(query[row].transpose(0, 1), *both, scores), rtol=0, atol=1e-5)


def test_a_token_written_again() -> None:
    """A slot that is given to another token holds that one only (a block that another request takes over)."""
    own = layout("trellis3")
    (key, value), slots = tokens((PAGE,), IDS)
    blocks = blocks_of(own)
    own.write(blocks, key.flip(0), value.flip(0), slots)
    own.write(blocks, key, value, slots)
    fresh = blocks_of(own)
    own.write(fresh, key, value, slots)
    assert torch.equal(blocks, fresh)


def test_strided_blocks() -> None:
    """Blocks between those of other layers, and ones larger than a record; smaller ones are refused."""
    own = layout("trellis3")
    (key, value), slots = tokens(LENGTHS, IDS)
    size = own.record.page_bytes
    wide = torch.zeros(12, 3 * size, dtype=torch.uint8)
    blocks = wide[:, size : 2 * size + 64]
    own.write(blocks, key, value, slots)
    assert not wide[:, :size].any()
    assert not wide[:, 2 * size :].any()
    alone = torch.zeros(12, size, dtype=torch.uint8)
    own.write(alone, key, value, slots)
    assert torch.equal(blocks[:, :size], alone)
    with pytest.raises(ValueError, match=f"takes {size} bytes"):
        own.write(wide[:, : size - 16], key, value, slots)


SCORES = {
    "plain": (Scores(0.125), None),
    "softcap": (Scores(0.125, softcap=2.0), None),
    "sinks": (Scores(0.125, sinks=torch.linspace(-1, 2, H * G)), None),
    "window of 70": (Scores(0.125), 70),
    "window of 1": (Scores(0.125), 1),
}


@pytest.mark.parametrize("name", SCORES)
def test_steps_of_a_server(name: str) -> None:
    """Three requests in chunks and single tokens, the third on the first one's blocks as prefix caching has it."""
    scores, window = SCORES[name]
    own = layout("trellis:k4v3")
    attention = BlockAttention(own, window)
    blocks = blocks_of(own)
    table = torch.tensor([[5, 2, 8, 0], [1, 10, 0, 0], [5, 2, 4, 0]], dtype=torch.int32)
    total = (150, 80, 140)
    data = {
        row: [normal(n, heads, D, seed=10 * row + i) for i, heads in enumerate((H, H, H * G))]
        for row, n in enumerate(total)
    }
    for x, y in zip(data[2][:2], data[0][:2], strict=True):
        x[: 2 * PAGE] = y[: 2 * PAGE]
    done = [0, 0, 2 * PAGE]
    # new tokens of each request: chunks cut anywhere, decoding beside prefill, decoding together, a request that waits
    for news in [(100, 7, 0), (30, 60, 0), (1, 1, 5), (1, 1, 1), (18, 11, 6)]:
        spans = [(row, before, before + n) for row, (before, n) in enumerate(zip(done, news, strict=True))]
        key, value, query = (torch.cat([data[row][i][a:b] for row, a, b in spans]) for i in range(3))
        slots = torch.tensor([int(table[row, t // PAGE]) * PAGE + t % PAGE for row, a, b in spans for t in range(a, b)])
        starts = [0, *torch.tensor(news).cumsum(0).tolist()]
        step = Step(table, tuple(starts), tuple(b for *_, b in spans))
        own.write(blocks, key, value, slots)
        out = torch.full_like(query, torch.nan)
        attention.attend(query, key, value, blocks, step, scores, out)
        for (row, a, b), start in zip(spans, starts, strict=False):
            if b > a:
                both = [torch.cat([coded(c, x[:a]), x[a:b]]) for c, x in zip(own.codecs, data[row][:2], strict=True)]
                wanted = dense(data[row][2][a:b], *both, scores, window)
                # float32 sums of up to 150 terms of size 1 against float64's
                torch.testing.assert_close(out[start : start + b - a], wanted, rtol=0, atol=1e-5)
        done = [b for *_, b in spans]


def test_requests_of_about_one_length_decode_together() -> None:
    """Where every row costs as much as the longest, rows of a group differ in pages by less than a factor of two."""
    lengths = (41, 65, 129, 300, 500, 4000)  # 1, 1, 2, 5, 8 and 63 pages before the new token
    starts = tuple(range(len(lengths) + 1))
    ids = torch.zeros(len(lengths), 63, dtype=torch.int32)
    groups = [rows.tokens.tolist() for rows in Step(ids, starts, lengths, alike=True).rows]
    assert groups == [[0, 1], [2], [3], [4], [5]]
    assert [rows.tokens.tolist() for rows in Step(ids, starts, lengths).rows] == [[0, 1, 2, 3, 4, 5]]


def test_windows_leave_blocks_out() -> None:
    """A window of 70 at 640 tokens reads two blocks of ten; those that vLLM has taken back may hold anything."""
    step = Step(torch.arange(1, 11, dtype=torch.int32).unsqueeze(0), (0, 1), (641,))
    (rows,) = step.windowed(70)
    assert rows.table.lengths == (640 - 8 * PAGE,)
    assert rows.table.ids[0, :2].tolist() == [9, 10]
    assert step.windowed(70)[0] is rows
    assert step.windowed(None)[0].table.lengths == (640,)


class TestSettings:
    @pytest.mark.parametrize("text", ["", "  "])
    def test_nothing_is_wanted(self, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(settings.VARIABLE, text)
        assert settings.wanted() is None
        before = set(sys.modules)
        register()
        assert not any(name.partition(".")[0] == "vllm" for name in set(sys.modules) - before)
        with pytest.raises(ValueError, match="is not set"):
            settings.chosen()

    def test_default(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(settings.VARIABLE, "default")
        assert settings.chosen() == CacheSpec.parse(codecs.DEFAULT)

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("trellis3,window=64", "leave out sinks= and window="),
            ("trellis3,layer0=exact", "leave out layerN="),
            ("trellis3,basis=shared", "learned from prompts"),
            ("trelis3", "did you mean"),
        ],
    )
    def test_refusals(self, text: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(settings.VARIABLE, text)
        with pytest.raises(ValueError, match=reason):
            settings.wanted()

    def test_a_basis(self, tmp_path: Path) -> None:
        """The layer's own means are used; another number of heads, layer or codec is refused."""
        path = tmp_path / "basis.safetensors"
        means = [normal(1, H, D, seed=seed) for seed in range(4)]
        fits = [({"mean": means[2 * i]}, {"mean": means[2 * i + 1]}) for i in range(2)]
        save(path, {i: Basis(("trellis3", "trellis3"), fit) for i, fit in enumerate(fits)})
        spec = CacheSpec.parse(f"trellis3,basis={path}")
        key, value = codecs.codecs(spec, D, H, torch.float32, layer=1)
        assert torch.equal(key.fit["mean"], means[2])
        assert torch.equal(value.fit["mean"], means[3])
        assert torch.equal(codecs.codecs(spec, D, H, torch.float32)[0].fit["mean"], means[0])
        with pytest.raises(ValueError, match="tensor parallelism goes without"):
            codecs.codecs(spec, D, 1, torch.float32, layer=1)
        with pytest.raises(ValueError, match="no basis of layer 5"):
            codecs.codecs(spec, D, H, torch.float32, layer=5)
        with pytest.raises(ValueError, match="was learned by trellis3"):
            codecs.codecs(CacheSpec.parse(f"trellis4,basis={path}"), D, H, torch.float32, layer=1)


class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.mark.parametrize(("spec", "queries"), [("trellis:k4v3", 1), ("key=lloyd5,value=kivi2", 20)])
    def test_kernels_read_blocks(self, spec: str, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """The kernels attend blocks that the reference wrote, by addresses, and read nothing that was not written.

        The bound is that of tests/coded_histories.py.
        """
        own, lengths, ids = layout(spec), (70, 64, 40), IDS[:, :2]
        (key, value), slots = tokens(lengths, ids)
        clean, dirty = blocks_of(own, fill=0), blocks_of(own)
        monkeypatch.setenv(backends.VARIABLE, "torch")
        for blocks in (clean, dirty):
            own.write(blocks, key, value, slots)
        chunk = Chunk(*(normal(3, heads, queries, D, seed=6 + heads) for heads in (H * G, H, H)))
        table = BlockTable(ids, lengths)
        good = expected(BlockHistory(own, clean, table, chunk.key, None), chunk, Mask(None, True), Scores(D**-0.5))
        check(BlockHistory(own, dirty, table, chunk.key, None), chunk, before=good)

    def test_kernels_write_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Tokens that the encode kernels code, in pages of 64, have the records that they have by themselves."""
        own = layout("lloyd3")
        (key, value), slots = tokens((70,), IDS[:1])
        found = []
        for backend in ("torch", "triton"):
            monkeypatch.setenv(backends.VARIABLE, backend)
            blocks = blocks_of(own)
            own.write(blocks, key, value, slots)
            found.append(blocks)
        assert not own.key.counts  # nothing was refused
        # a number between two levels may round either way, and a gain by half a unit of float16
        assert float((found[0] != found[1]).float().mean()) < 0.01


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_under_the_interpreter() -> None:
    pytest.importorskip("triton", reason="the kernels need Triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "TestInterpreted"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
