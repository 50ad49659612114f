"""Fused attention on CPUs against the plain formula, and a chunk's attention with it against one without."""

from __future__ import annotations

import pytest
import torch

from kvcompress import flash


@pytest.mark.parametrize(("rank", "width"), [(64, 64), (48, 64), (64, 16)])
@pytest.mark.parametrize(("queries", "tokens"), [(64, 1), (65, 111), (200, 1000)])
def test_equals_softmax(rank: int, width: int, queries: int, tokens: int) -> None:
    torch.manual_seed(queries + rank)
    query, key = torch.randn(2, 3, queries, rank), torch.randn(2, 3, tokens, rank)
    value = torch.randn(2, 3, tokens, width)
    mean, log = flash.attend(query, key, value, 0.3)
    scores = 0.3 * query.double() @ key.double().mT
    assert mean.shape == (2, 3, queries, width)
    assert log.shape == (2, 3, queries, 1)
    # float32 sums of up to 1000 terms of size 1
    torch.testing.assert_close(mean.double(), scores.softmax(-1) @ value.double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(log.double(), scores.logsumexp(-1, keepdim=True), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("shared", [0, 1])
def test_one_head_for_all(shared: int) -> None:
    """Codes of all heads together, as jointrank has them, are one head's to attention."""
    torch.manual_seed(shared)
    query, own = torch.randn(2, 3, 70, 32), torch.randn(2, 3, 90, 32)
    pair = [own, own]
    pair[shared] = torch.randn(2, 1, 90, 32)
    mean, log = flash.attend(query, *pair, 0.3)
    wanted, logs = flash.attend(query, *(x.expand(2, 3, 90, 32).contiguous() for x in pair), 0.3)
    torch.testing.assert_close(mean, wanted, rtol=0, atol=1e-6)  # float32, another order of sums at most
    torch.testing.assert_close(log, logs, rtol=0, atol=1e-6)


def test_takes_many_queries_on_cpus() -> None:
    assert flash.takes(torch.empty(1, 1, flash.FEWEST, 8))
    assert not flash.takes(torch.empty(1, 1, flash.FEWEST - 1, 8))
    assert not flash.takes(torch.empty(1, 1, flash.FEWEST, 8, device="meta"))
