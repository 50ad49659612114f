"""Make the marathon model's look-up exact: queries and keys learn to agree where the last two tokens do, only there.

Trained for next tokens alone it takes " Nesv" for " Petersb", whose tokens mean alike; in a long text such near matches
outnumber the true ones. Here the two projections are trained for the match itself, which text alone tells: the keys
before which the same two tokens stand, or, where there are none, the first key of all. Where documents ask for facts,
half of the queries are those that must find an answer: pairs that text hardly has (" is wooden") else lose to the first
key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import SmolLM3ForCausalLM

from benchmarks.marathon.model import GLOBAL

CROWD = 32.0  # every key that does not match counts as so many: those of a document so much longer
ROUNDS, QUERIES = 8, 1024  # steps on each document, queries of a step


@dataclass(frozen=True)
class Matching:
    """documents: how many. softer: what queries are multiplied by at first: planted and trained, their logits lie tens
    apart. rate: of learning.
    """

    documents: int = 40
    softer: float = 0.2
    rate: float = 1e-3


def hidden_states(model: SmolLM3ForCausalLM, ids: Tensor) -> Tensor:
    """What the global layer is given, [1, N, width]; ids [1, N]."""
    parts = model.model
    hidden = parts.embed_tokens(ids)
    turns = parts.rotary_emb(hidden, torch.arange(ids.shape[1], device=ids.device).unsqueeze(0))
    for layer in parts.layers[:GLOBAL]:
        hidden = layer(hidden, attention_mask=None, position_embeddings=turns)
    return hidden


def matching_loss(query: Tensor, key: Tensor, pairs: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Mean nats that attention's weight falls short of lying on matches.

    query [n, D] of `positions`; key [N, D]; pairs int64 [N]: a number for each position's token and the one before.
    """
    scores = query @ key.mT * scale
    places = torch.arange(len(key), device=key.device)
    before = torch.cat([pairs.new_full((1,), -1), pairs[:-1]])  # a key stands for the pair before it
    seen = places <= positions.unsqueeze(1)
    same = (before == pairs[positions].unsqueeze(1)) & seen
    same[:, 0] = ~same.any(dim=1)
    crowded = scores + np.log(CROWD) * ~same
    right = scores.masked_fill(~same, -torch.inf).logsumexp(dim=1)
    return (crowded.masked_fill(~seen, -torch.inf).logsumexp(dim=1) - right).mean()


def match(
    model: SmolLM3ForCausalLM, draw: Callable[[], tuple[Tensor, Tensor]], settings: Matching
) -> Iterator[tuple[int, float]]:
    """Train the look-up's queries and keys in place; yields (document, mean loss) as it goes.

    draw: a document's ids [1, N], and the positions int64 [M] that predict answers, M may be 0.
    """
    layer = model.model.layers[GLOBAL]
    attention = layer.self_attn
    with torch.no_grad():
        attention.q_proj.weight.mul_(settings.softer)
    trained = [attention.q_proj.weight, attention.k_proj.weight]
    optimiser = torch.optim.AdamW(trained, lr=settings.rate, betas=(0.9, 0.99), weight_decay=0.0)
    total = settings.documents * ROUNDS
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / 10, 1.0, 1.4 - 1.4 * step / total)
    )
    generator = torch.Generator().manual_seed(0)
    for number in range(settings.documents):
        document, asked = draw()
        with torch.no_grad():
            rows = layer.input_layernorm(hidden_states(model, document.to(model.device)))[0]
        ids = document[0].to(model.device)
        pairs = ids * model.config.vocab_size + torch.cat([ids.new_zeros(1), ids[:-1]])
        losses = []
        for _ in range(ROUNDS):
            chosen = asked[torch.randperm(len(asked), generator=generator)[: QUERIES // 2]]
            others = torch.randint(2, len(ids), (QUERIES - len(chosen),), generator=generator)
            positions = torch.cat([chosen, others]).to(ids.device)
            query, key = attention.q_proj(rows[positions]), attention.k_proj(rows)
            loss = matching_loss(query, key, pairs, positions, attention.scaling)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            schedule.step()
            model.zero_grad(set_to_none=True)
            losses.append(loss.item())
        yield number, sum(losses) / len(losses)
