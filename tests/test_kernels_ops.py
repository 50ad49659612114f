"""The ops of kernels/ops.py: what torch.library asks of an op, fakes that tell shapes, texts that give plans back.

A function that Triton interprets cannot be compiled, so what is interpreted runs in a process of its own: this file
again, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map

pytest.importorskip("triton", reason="the kernels need Triton")

from kvcompress.kernels.layout import BandLayout, LevelTable, TrellisTable
from kvcompress.kernels.segments import plan

from kvcompress.kernels import ops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, with TRITON_INTERPRET=1")

B, H, G, D, PAGE = 1, 2, 3, 16, 64
LEVELS = LevelTable((-1.5, -0.5, 0.5, 1.5), (-1.0, 0.0, 1.0), (0, 1, 2, 3), 1.0, 1.5)
BAND = BandLayout(0, D, "lloyd", 2, codes=0, scale=H * D * PAGE // 4, table=LEVELS)
PAGE_BYTES = BAND.scale + H * PAGE * 2
BANDS, PLAN = ops.text_of_bands((BAND,)), ops.text_of_plan(plan((BAND,), 0))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ints(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


QUERY, KEY, VALUE = random(B, H * G, 1, D, seed=1), random(B, H, 5, D, seed=2), random(B, H, 5, D, seed=3)
RECORDS = torch.zeros(B, PAGE_BYTES, dtype=torch.uint8)  # a page of zeros
TABLE = (torch.tensor([[RECORDS.data_ptr()]]), ints([4]), ints([63]), ints(1))
MATRIX, MEAN = random(1, H, D, D, seed=4), random(B, H, D, seed=5)
PLANES = (torch.arange(D, dtype=torch.int32), random(D // 2, seed=6), torch.ones(D // 2))
HALVES = MATRIX[..., : D // 2].half().contiguous(), MATRIX[..., D // 2 :].half().contiguous()
STEPS = torch.ones(PAGE, D // 2), torch.zeros(PAGE, D // 2)
ABSORBED = (
    random(B, H, 1, G, D).half(),
    torch.ones(B, H, 1, 1),
    random(B, H, 1, G),
    torch.zeros(B, H, 1, G, 16, dtype=torch.float16),
)
MEANS, LOGS = ([random(B, H, parts, *shape) for parts in (2, 1)] for shape in ((G, D), (G,)))

#: A call or two of every op, with its optional arguments and without.
CALLS: dict[str, tuple[Any, ...]] = {
    "absorb": (QUERY, MATRIX, MEAN, PLAN, 0.25, None, None, 1, 0, None, None, None),
    "absorb.turned": (QUERY, MATRIX, None, PLAN, 0.25, TABLE[1], TABLE[3], 1, 32, *PLANES),
    "attend_pages": (*ABSORBED, False, *TABLE, PLAN, PLAN, torch.ones(256), None, None, None, 1),
    "attend_rebuilt": (
        QUERY, *HALVES, MEAN, *PLANES, "token", *STEPS, *TABLE, 1, PLAN, PLAN, torch.ones(256), 0.25, None, None, None,
        1,
    ),
    "attend_dense": (QUERY, KEY, VALUE, 0.25, None, None, ints(3), None, None, False, 2),
    "attend_dense.masked": (QUERY, KEY, VALUE, 0.25, 30.0, ints(1), None, KEY[:, 0, :, 0] > 0, None, True, 1),
    "attend_chunk": (KEY.repeat(1, G, 1, 1), KEY, VALUE, 0.25, None, None),
    "merge": (MEANS, LOGS, None, torch.float16),
    "merge.sinks": (MEANS[:1], LOGS[:1], random(H * G), torch.float32),
    "encode_side": (random(B, H, PAGE, D), MEAN, MATRIX, torch.zeros_like(RECORDS), BANDS),
}  # fmt: skip


def op(call: str) -> Any:
    return getattr(torch.ops.kvcompress, call.split(".")[0]).default


def described(result: Any) -> list[tuple[Any, ...]]:
    return [(x.shape, x.stride(), x.dtype, x.device) for x in tree_flatten(result)[0] if x is not None]


@interpreted
@pytest.mark.parametrize("call", CALLS)
def test_the_op_is_what_torch_asks_for(call: str) -> None:
    """Its schema says what it changes, its fake is right, with symbols for shapes too, and it can be compiled."""
    torch.library.opcheck(op(call), CALLS[call])


@interpreted
@pytest.mark.parametrize("call", CALLS)
def test_fakes_have_the_shapes_of_results(call: str) -> None:
    real = op(call)(*CALLS[call])
    with FakeTensorMode() as mode:
        fakes = tree_map(lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, CALLS[call])
        assert described(op(call)(*fakes)) == described(real)


@pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")
@pytest.mark.slow  # the interpreter takes half a second a page
def test_interpreted() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]


def test_texts_give_plans_and_bands_back() -> None:
    trellis = TrellisTable((tuple(range(8)),) * 3, 10.1, 1 / 3)
    bands = (
        BAND,
        BandLayout(D, 32, "trellis", 3, "log", 512, 1024, table=trellis),
        BandLayout(0, 8, "affine_token", 5),
    )
    assert ops.bands_of_text(ops.text_of_bands(bands)) == bands
    made = plan(bands[:2], 0)
    assert ops.plan_of(ops.text_of_plan(made)) == made


def test_a_graph_holds_ops() -> None:
    """Traced, a launch is one node, whose fake gives the result its shape: nothing is launched."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return lambda *inputs: [torch.zeros(B, H, G, D)]

    def decode(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        part = ops.attend_dense(query, key, value, 0.25, splits=2)
        absorbed = ops.absorb(query, MATRIX, MEAN, PLAN, 0.25)
        other = ops.attend_pages(absorbed, ops.Table(*TABLE, 1), PLAN, PLAN, torch.ones(256), None, None, 2)
        return ops.merge([part, other])[0]

    torch.compile(decode, backend=keep, fullgraph=True)(QUERY, KEY, VALUE)
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    wanted = [f"kvcompress.{name}.default" for name in ("attend_dense", "absorb", "attend_pages", "merge")]
    assert [name for name in called if name.startswith("kvcompress")] == wanted
