"""Decoding that a graph can hold (kvcompress/static.py) against a history that grows token by token.

What launches kernels runs in a process of its own, this file again with TRITON_INTERPRET=1: about a second a page, so
contexts are short, and most steps add a token without attending.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig

pytest.importorskip("triton", reason="the kernels need Triton")

from kvcompress import reference
from kvcompress.codecs import Geometry
from kvcompress.history import History
from kvcompress.reference import Mask, Scores
from kvcompress.rope import Rope
from kvcompress.spec import CacheSpec
from kvcompress.static import StaticDecode
from kvcompress.store import PAGE

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, with TRITON_INTERPRET=1")
CUDA = torch.cuda.is_available() and not INTERPRETED

D, H, G, SINKS, WINDOW = 64, 1, 2, 4, 16
SCORES = Scores(D**-0.5)
#: Kernels round what codes stand for and softmax weights to float16, 2^-11 of means of numbers of size 1.
CLOSE = 2**-10


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prefilled(
    lengths: list[int], spec: str = "trellis3", window: int = WINDOW, like: History | None = None, move: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> History:  # fmt: skip
    """A history of rows of these lengths, the same every time. like: one whose first row's fit it starts with."""
    codecs = CacheSpec.parse(spec).layer(0, 1)
    key, value = codecs.key.build(Geometry(D, 0, H)), codecs.value.build(Geometry(D, 1, H))
    config = LlamaConfig(hidden_size=D * H, num_attention_heads=H, head_dim=D)
    preset = None
    if like is not None:
        first, second = ({name: x[:1] for name, x in fit.items()} for fit in like.fits)
        preset = first, second
    rotation = Rope.of(config, D) if key.frame != "fixed" else None
    history = History(key, value, SINKS, window, rotation=rotation, preset=preset)
    shape = len(lengths), H, max(lengths), D
    tokens = (x.to(move, dtype) for x in (random(*shape, seed=1) + 1, random(*shape, seed=2) - 1))
    history.append(*tokens, lengths)
    history.code()
    return history


def token(step: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        random(rows, H * G, 1, D, seed=10 + step),
        random(rows, H, 1, D, seed=100 + step),
        random(rows, H, 1, D, seed=step),
    )


def attended(history: History, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return reference.attend(query, history, key, value, Mask(None, causal=True), SCORES)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= CLOSE * float(wanted.abs().max())


@interpreted
def test_seventy_steps_are_those_of_a_history() -> None:
    """A page closes in each row, at different steps; the first and the last step attend."""
    lengths = [140, 180]
    history, decode = prefilled(lengths), StaticDecode(prefilled(lengths), 300, G)
    for step in range(70):
        query, key, value = token(step, 2)
        if step in (0, 69):
            assert_close(decode.step(query, key, value, SCORES), attended(history, query, key, value))
        else:
            decode.append(key, value)
        decode.settle(1)
        history.append(key, value, [1, 1])
        history.code()
        assert decode.table.counts.tolist() == list(history.addresses().held)
        assert decode.stored.tolist() == [SINKS + held for held in history.held]
    assert decode.table.counts.tolist() == [2, 3]


@interpreted
def test_a_compiled_step_is_the_step() -> None:
    """One graph, which settling does not make stale; what was stored or learned in inference mode may enter it."""
    with torch.inference_mode():
        decode = StaticDecode(prefilled([140]), 300, G)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(decode.step, backend=counter, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for step in range(2):
            query, key, value = token(step, 1)
            eager = decode.step(query, key, value, SCORES)
            decode.stored.sub_(1)  # undone
            assert torch.equal(compiled(query, key, value, SCORES), eager)
            decode.append(key, value)
            decode.settle(2)
    assert decode.stored.tolist() == [SINKS + 72 + 4]  # 136 tokens after the sinks, of which a page is coded
    assert counter.frame_count == 1


@interpreted
def test_queries_turn_with_pages() -> None:
    """`spectral3` codes keys in the frame of their page's middle; a row's fit waits for 512 tokens."""
    history, decode = (prefilled([516], "spectral3", window=448) for _ in range(2))
    query, key, value = token(0, 1)
    assert_close(StaticDecode(decode, 600, G).step(query, key, value, SCORES), attended(history, query, key, value))


@interpreted
@torch.no_grad()
def test_keys_are_rebuilt_where_queries_cannot_turn_with_them() -> None:
    """`prerope` codes every key without its rotary embedding; the step is one graph all the same."""
    spec = "prerope+trellis3"
    history, decode = prefilled([140], spec), StaticDecode(prefilled([140], spec), 300, G)
    query, key, value = token(0, 1)
    found = decode.step(query, key, value, SCORES)
    assert_close(found, attended(history, query, key, value))
    decode.rewind(0)
    compiled = torch.compile(decode.step, backend="aot_eager", fullgraph=True, dynamic=False)
    assert torch.equal(compiled(query, key, value, SCORES), found)


@interpreted
def test_a_row_may_have_no_pages_and_few_tokens() -> None:
    """With a fit that was learned before, a row of two tokens has no page and fills its sinks first."""
    like = prefilled([140])
    history, decode = prefilled([84, 2], like=like), StaticDecode(prefilled([84, 2], like=like), 200, G)
    for step in range(3):
        query, key, value = token(step, 2)
        if step == 2:
            assert_close(decode.step(query, key, value, SCORES), attended(history, query, key, value))
        else:
            decode.append(key, value)
        history.append(key, value, [1, 1])
        history.code()
    assert decode.table.counts.tolist() == [1, 0]
    assert decode.stored.tolist() == [SINKS + WINDOW + 3, 5]
    decode.settle(3)
    assert torch.equal(decode.history.dense(0), history.dense(0))


@interpreted
def test_when_it_settles_changes_nothing() -> None:
    """Pages hold the same codes however late they close, in the slab that was made for them."""
    often, seldom = (StaticDecode(prefilled([140, 180]), 400, G) for _ in range(2))
    tensors = [*seldom.exact, seldom.stored, seldom.table.addresses, seldom.table.starts, seldom.table.counts]
    places, slabs = [x.data_ptr() for x in tensors], len(seldom.history.pool.slabs)
    for step in range(2 * PAGE):
        _, key, value = token(step, 2)
        often.append(key, value)
        seldom.append(key, value)
        often.settle(1)
        if step % PAGE == PAGE - 1:
            seldom.settle(PAGE)
    assert often.table.counts.tolist() == seldom.table.counts.tolist() == [3, 4]
    for side in (0, 1):
        assert torch.equal(often.history.dense(side), seldom.history.dense(side))
    for own, other in zip(often.exact, seldom.exact, strict=True):
        for row, stored in enumerate(often.stored.tolist()):
            assert torch.equal(own[row, :, :stored], other[row, :, :stored])
    assert torch.equal(often.table.starts[1], torch.tensor([4, 68, 132, 196, 0]))
    assert [x.data_ptr() for x in tensors] == places
    assert len(seldom.history.pool.slabs) == slabs
    slab = seldom.history.pool.slabs[-1]
    inside = seldom.table.addresses[:, 2] - slab.data_ptr()
    assert bool(((inside >= 0) & (inside < slab.numel())).all())


@interpreted
def test_what_it_does_not_take() -> None:
    with pytest.raises(ValueError, match="without tokens"):
        StaticDecode(History(*prefilled([140]).codecs, SINKS, WINDOW), 300, G)
    with pytest.raises(ValueError, match=r"after 132 tokens; rows hold \[140, 100\], rows \[1\] wait"):
        StaticDecode(prefilled([140, 100]), 300, G)
    with pytest.raises(ValueError, match="capacity must be at least the 140 tokens held, got 139"):
        StaticDecode(prefilled([140]), 139, G)
    with pytest.raises(ValueError, match="refuse lloyd codes of 8 bits"):
        StaticDecode(prefilled([140], "lloyd8"), 300, G)
    decode = StaticDecode(prefilled([140]), 150, G)
    _, key, value = token(0, 1)
    with pytest.raises(ValueError, match=r"one token's key \(1, 1, 1, 64\) in torch.float32, got \(1, 1, 2, 64\)"):
        decode.append(key.expand(-1, -1, 2, -1), value)
    assert decode.room == 10
    for _ in range(11):
        decode.append(key, value)
    with pytest.raises(ValueError, match=r"room for 0 to 10 steps .* 140 tokens of a capacity of 150\), got 11"):
        decode.settle(11)


@pytest.mark.skipif(INTERPRETED or CUDA, reason="needs a machine on which kernels cannot run")
def test_it_needs_kernels() -> None:
    with pytest.raises(ValueError, match="on a CPU only with TRITON_INTERPRET=1"):
        StaticDecode(prefilled([140]), 300, G)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@torch.no_grad()
def test_a_cuda_graph_replays_the_step() -> None:
    """The same kernels with the same splits: equal to the last bit, also after a page has closed."""
    lengths = [140, 180]
    replayed, eager = (StaticDecode(prefilled(lengths, move="cuda", dtype=torch.float16), 400, G) for _ in range(2))
    inputs = [x.to("cuda", torch.float16) for x in token(0, 2)]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        replayed.step(*inputs, SCORES)  # compiles the kernels, and allocates what is kept
        replayed.stored.sub_(1)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = replayed.step(*inputs, SCORES)
    for first in (0, 3):
        for step in range(first, first + 3):
            own = [x.to("cuda", torch.float16) for x in token(step, 2)]
            for place, x in zip(inputs, own, strict=True):
                place.copy_(x)
            graph.replay()
            assert torch.equal(out, eager.step(*own, SCORES))
        _, key, value = own
        for decode in (replayed, eager):
            for _ in range(40):
                decode.append(key, value)
            decode.settle(43)
    assert replayed.table.counts.tolist() == eager.table.counts.tolist() == [3, 3]


@pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")
@pytest.mark.slow  # the interpreter
def test_interpreted() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
