"""What a compressed cache does to a model's predictions: mean KL divergence from the uncompressed ones.

Text is fed in chunks, teacher forced. A chunk attends its own tokens exactly and all before it through the cache, so
that a chunk of the whole text would measure nothing, and chunks of CHUNK tokens measure the codes almost everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from kvcompress.attention import NAME
from kvcompress.cache import CompressedCache
from kvcompress.spec import CacheSpec

CHUNK = 512  # tokens
MOST_LOGITS = 2**26  # of all passages together (float32, 256 MB): positions are thinned evenly to that


@dataclass(frozen=True)
class Text:
    """A tokenised text: ids int64 [tokens] without special tokens; prefix: what opens any text (BOS, or nothing)."""

    ids: Tensor
    prefix: Tensor

    @classmethod
    def encode(cls, tokenizer: Any, text: str) -> Text:
        """A text by a Hugging Face tokenizer."""
        ids, empty = (tokenizer(t, add_special_tokens=not t, verbose=False).input_ids for t in (text, ""))
        return cls(torch.tensor(ids, dtype=torch.int64), torch.tensor(empty[:1], dtype=torch.int64))

    def room(self, length: int) -> int:
        """How many passages of `length` tokens there are that do not overlap."""
        return len(self.ids) // max(length - len(self.prefix), 1)

    def passages(self, count: int, length: int, seed: int = 0) -> list[Tensor]:
        """`count` passages [1, length] that do not overlap, evenly over the text, each opened by the prefix.

        seed: draws where in its share of the text a passage lies. Raises ValueError where the text is too short.
        """
        if count > self.room(length):
            raise ValueError(
                f"the text has {len(self.ids)} tokens, too few for {count} passages of {length} that do not overlap: "
                "give more text, a shorter --context or fewer --passages"
            )
        body, share = length - len(self.prefix), len(self.ids) // count
        rng = random.Random(seed)
        starts = [share * index + rng.randrange(share - body + 1) for index in range(count)]
        return [torch.cat([self.prefix, self.ids[start : start + body]]).unsqueeze(0) for start in starts]


@contextmanager
def attending(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model attends on codes; raises ValueError for a model whose attention cannot be switched."""
    own = model.config._attn_implementation or "eager"
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


@dataclass(frozen=True)
class Measured:
    """kl: mean over all scored positions, in nats per token. bits: of a coded element, overheads included; effective:
    of any element, with everything that is held exactly.
    """

    kl: float
    bits: float
    effective: float


class Judge:
    """Holds what a model predicts without compression on passages [1, N], all of one length.

    coded_from: tokens that a cache sees before it codes any (`learning.coded_from`); what is predicted up to there is
    not scored. Raises ValueError for passages less than twice as long.
    """

    def __init__(self, model: PreTrainedModel, texts: Sequence[Tensor], coded_from: int = CHUNK):
        self.model, self.texts = model, [text.to(model.device) for text in texts]
        self.context = texts[0].shape[1]
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        if self.context < 2 * coded_from:
            raise ValueError(
                f"a passage must have {2 * coded_from} tokens or more, since codes are met after {coded_from}, "
                f"got a --context of {self.context}"
            )
        first, last = max(self.context // 4, coded_from), self.context - 1  # early predictions meet few codes
        count = max(1, min(last - first + 1, MOST_LOGITS // (vocabulary * len(texts))))
        self.positions = torch.linspace(first, last, count, dtype=torch.float64).round().long()
        self.reference = [self._predict(text, DynamicCache(config=model.config)) for text in self.texts]

    @torch.inference_mode()
    def _predict(self, text: Tensor, cache: Cache) -> Tensor:
        """Log-probabilities float32 [positions, vocabulary] of the next tokens."""
        parts = []
        for start in range(0, self.context, CHUNK):
            piece = text[:, start : start + CHUNK]
            kept = self.positions[(self.positions >= start) & (self.positions < start + CHUNK)] - start
            out = self.model(piece, past_key_values=cache, use_cache=True, logits_to_keep=kept.to(piece.device))
            parts.append(out.logits[0].float().log_softmax(dim=-1))
        return torch.cat(parts)

    def measure(self, spec: CacheSpec) -> Measured:
        """What caches under a spec do; raises ValueError as `CompressedCache` does."""
        total, bits, effective = 0.0, 0.0, 0.0
        with attending(self.model):
            for text, reference in zip(self.texts, self.reference, strict=True):
                cache = CompressedCache(self.model.config, spec)
                found = self._predict(text, cache)
                total += F.kl_div(found, reference, reduction="batchmean", log_target=True).item()
                memory = cache.memory()
                bits, effective = memory.bits_per_element, memory.effective_bits_per_element
        return Measured(total / len(self.texts), bits, effective)
