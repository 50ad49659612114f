"""Quality through a cache: a text is fed in chunks, teacher forced, and its predictions held against a reference's.

A chunk attends its own tokens exactly and all before it through the cache. That is what makes the comparison fair: a
QuantizedCache hands back the exact keys of its first call, so that a prefill at once would measure nothing. These are
the measures; `python -m benchmarks quality`, which takes them of all caches, is `frontier.run`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, PreTrainedModel

from benchmarks.caches import Contender

#: The most logits kept of one passage (float32, 256 MB): with a vocabulary of 150,000 about 440 positions are scored.
MOST_LOGITS = 2**26

Advance = Callable[[int], object]


@dataclass(frozen=True)
class Predictions:
    """What a model said through a cache: log-probabilities float32 [positions, vocabulary], and at what speed."""

    log_probs: Tensor
    cache: Cache
    seconds: float


@dataclass(frozen=True)
class Quality:
    """Over all scored positions of all passages: perplexity, KL to the uncompressed model (nats a token), agreement."""

    perplexity: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    positions: int

    def fields(self) -> dict[str, Any]:
        """By the names that rows of results have for them."""
        found = asdict(self)
        return {"scored_positions": found.pop("positions"), **found}


def scored_positions(length: int, vocabulary: int) -> Tensor:
    """Positions whose next token is scored: from 512 on (a quarter of a short text), evenly thinned to MOST_LOGITS."""
    first, last = min(512, length // 4), length - 2
    count = max(1, min(last - first + 1, MOST_LOGITS // vocabulary))
    return torch.linspace(first, last, count, dtype=torch.float64).round().long()


@torch.inference_mode()
def predict(
    model: PreTrainedModel, contender: Contender, ids: Tensor, positions: Tensor, chunk: int, advance: Advance
) -> Predictions:
    """Feed ids [1, N] to a fresh cache, `chunk` tokens at a time; keep what is predicted after `positions` (sorted)."""
    cache, parts, seconds = contender.make(model.config), [], 0.0
    ids = ids.to(model.device)
    with contender.attending(model):
        for start in range(0, ids.shape[1], chunk):
            piece = ids[:, start : start + chunk]
            kept = positions[(positions >= start) & (positions < start + chunk)] - start
            begun = time.perf_counter()
            logits = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=kept.to(model.device)).logits
            if logits.is_cuda:
                torch.cuda.synchronize()
            seconds += time.perf_counter() - begun
            parts.append(logits[0].float().log_softmax(dim=-1))
            advance(piece.shape[1])
    return Predictions(torch.cat(parts), cache, seconds)


def divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference || other) in nats per position, of log-probabilities [positions, vocabulary]."""
    return F.kl_div(other, reference, reduction="none", log_target=True).sum(dim=-1)


def compare(reference: Sequence[Tensor], others: Sequence[Tensor], targets: Sequence[Tensor]) -> Quality:
    """Log-probabilities [positions, vocabulary] of all passages against the reference's; targets: the true next ids."""
    pairs = list(zip(reference, others, strict=True))
    kl = torch.cat([divergence(a, b) for a, b in pairs])
    agree = torch.cat([a.argmax(dim=-1) == b.argmax(dim=-1) for a, b in pairs])
    nll = torch.cat([-b.gather(1, t.to(b.device)[:, None])[:, 0] for b, t in zip(others, targets, strict=True)])
    return Quality(
        perplexity=nll.mean().exp().item(),
        kl_mean=kl.mean().item(),
        kl_p99=kl.quantile(0.99).item(),
        top1_agreement=agree.float().mean().item(),
        positions=len(kl),
    )
