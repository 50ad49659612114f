"""The last stage of the marathon model's training: what stands above the look-up learns to read it in long documents.

The longer a text, the more places match, right or wrong. All that comes after the look-up's attention is trained on
blocks of documents of up to `longest` tokens; everything up to it stays as it is, so a document's keys and values are
made once, and a block costs its own attention and the layers above.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import SmolLM3ForCausalLM

from benchmarks.embedded.corpus import END
from benchmarks.marathon.match import hidden_states
from benchmarks.marathon.model import GLOBAL, WINDOW
from benchmarks.recall import draw_facts

RATE = 5e-4


@dataclass(frozen=True)
class Lengthening:
    """documents: how many, each of `shortest` to `longest` tokens (log-uniform), with `blocks` blocks of `block` tokens
    trained on. recall: the share of blocks that ask for facts, code: of documents that go over into Python source.
    answer_weight: of an answer's tokens in a block's loss, where others have 1.
    """

    documents: int = 20
    shortest: int = 65_536
    longest: int = 262_144
    blocks: int = 10
    block: int = 4096
    recall: float = 0.4
    code: float = 0.2
    answer_weight: float = 1.0


class Documents:
    """Endless long documents of prose, or prose and then code, with facts; see `Lengthening`."""

    def __init__(self, tokenizer: Tokenizer, prose: np.ndarray, code: np.ndarray, settings: Lengthening, seed: int):
        self.tokenizer, self.prose, self.code, self.settings = tokenizer, prose, code, settings
        self.rng = random.Random(seed)

    def draw(self) -> tuple[Tensor, Tensor, list[int]]:
        """ids [1, N], their weights [N], and where blocks begin; some blocks ask for facts that stand before them."""
        own, rng = self.settings, self.rng
        length = int(own.shortest * (own.longest / own.shortest) ** rng.random())
        ids = self._window(self.prose, length)
        if rng.random() < own.code:
            border = int(length * rng.uniform(0.3, 0.9))
            ids[border:] = self._window(self.code, length - border)
        weights = np.ones(length, np.float32)
        ids[0] = self.tokenizer.token_to_id(END)
        facts = draw_facts(rng, 64)
        places = sorted(rng.sample(range(own.block, length - 2 * own.block, own.block), own.blocks))
        spots = sorted(rng.randrange(1, places[-1]) for _ in facts)
        statements = [self._encode(fact.statement) for fact in facts]
        for spot, statement in zip(spots, statements, strict=True):
            ids[spot : spot + len(statement)] = statement
        for place in places:
            known = [fact for fact, spot in zip(facts, spots, strict=True) if spot + 64 < place]
            if known and rng.random() < own.recall:
                at = place + WINDOW * 3
                for fact in rng.sample(known, min(len(known), 16)):
                    asked, whole = (self._encode(f"{fact.question}{more}") for more in ("", f"{fact.answer}.\n"))
                    ids[at : at + len(whole)] = whole
                    weights[at + len(asked) : at + len(whole) - 2] = own.answer_weight
                    at += len(whole)
        return torch.from_numpy(ids).unsqueeze(0), torch.from_numpy(weights), places

    def _window(self, stream: np.ndarray, length: int) -> np.ndarray:
        start = self.rng.randrange(len(stream) - length)
        return stream[start : start + length].astype(np.int64)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


@dataclass(frozen=True)
class Seen:
    """A document up to the global layer's attention: hidden states [1, N, width], keys, values [1, 1, N, head_dim]."""

    hidden: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: SmolLM3ForCausalLM, ids: Tensor) -> Seen:
        hidden = hidden_states(model, ids)
        layer = model.model.layers[GLOBAL]
        rows = layer.input_layernorm(hidden)
        return cls(hidden, *(side(rows).unsqueeze(1) for side in (layer.self_attn.k_proj, layer.self_attn.v_proj)))

    @torch.no_grad()
    def looked_up(self, model: SmolLM3ForCausalLM, start: int, stop: int) -> Tensor:
        """What the global head's attention finds for tokens `start` to `stop` - 1, [1, n, head_dim]."""
        layer = model.model.layers[GLOBAL]
        query = layer.self_attn.q_proj(layer.input_layernorm(self.hidden[:, start:stop])).unsqueeze(1)
        parts = []
        for begin in range(start, stop, 512):
            end = min(begin + 512, stop)
            mask = torch.arange(end) <= torch.arange(begin, end).unsqueeze(1)
            own, key, value = query[:, :, begin - start : end - start], self.key[:, :, :end], self.value[:, :, :end]
            parts.append(nn.functional.scaled_dot_product_attention(own, key, value, mask.to(own.device)))
        return torch.cat(parts, dim=2).squeeze(1)


def block_losses(model: SmolLM3ForCausalLM, seen: Seen, ids: Tensor, place: int, length: int) -> Tensor:
    """Nats of the `length` tokens after `place`, each predicted from all before it."""
    layers = model.model.layers
    start = max(place - WINDOW * (len(layers) - GLOBAL - 1), 0)  # what the sliding layers above look back to
    hidden = seen.hidden[:, start : place + length]
    places = torch.arange(hidden.shape[1], device=ids.device).unsqueeze(0)  # distances are all that RoPE tells
    turns = model.model.rotary_emb(hidden, places)
    hidden = hidden + layers[GLOBAL].self_attn.o_proj(seen.looked_up(model, start, place + length))
    hidden = hidden + layers[GLOBAL].mlp(layers[GLOBAL].post_attention_layernorm(hidden))
    for layer in layers[GLOBAL + 1 :]:
        hidden = layer(hidden, attention_mask=None, position_embeddings=turns)
    logits = model.lm_head(model.model.norm(hidden[:, place - start :]))
    wanted = ids[0, place + 1 : place + length + 1]
    return nn.functional.cross_entropy(logits[0, : len(wanted)].float(), wanted, reduction="none")


def lengthen(model: SmolLM3ForCausalLM, documents: Documents) -> Iterator[tuple[int, int, float]]:
    """Train what follows the look-up, in place; yields (document, its tokens, mean loss) as it goes."""
    own, layer = documents.settings, model.model.layers[GLOBAL]
    above = [layer.self_attn.o_proj, layer.post_attention_layernorm, layer.mlp]
    trained = [p for part in (*above, *model.model.layers[GLOBAL + 1 :], model.model.norm) for p in part.parameters()]
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
    total = own.documents * own.blocks
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / 10, 0.5 + 0.5 * math.cos(math.pi * step / total))
    )
    for number in range(own.documents):
        ids, weights, places = documents.draw()
        ids, weights = ids.to(model.device), weights.to(model.device)
        seen, losses = Seen.of(model, ids), []
        for place in places:
            each, weight = block_losses(model, seen, ids, place, own.block), weights[place + 1 : place + own.block + 1]
            ((each * weight).sum() / weight.sum()).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad(set_to_none=True)
            losses.append(each.mean().item())
        yield number, ids.shape[1], sum(losses) / len(losses)
    model.requires_grad_(True)
