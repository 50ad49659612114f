"""lm-eval's model for transformers, made to read through a cache: what `python -m benchmarks lmeval` evaluates.

For likelihoods `HFLM` calls the model on a whole text without a cache, so that no cache's error would show. Here every
text goes through a fresh cache in chunks, and a generated answer continues one: a chunk attends its own tokens exactly,
and all before them as the cache has them. Needs lm-eval (`pip install -c constraints.txt -e '.[eval]'`).
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.caches import Contender
from kvcompress import CompressedCache


class CachedLM(HFLM):
    """`HFLM` of a model at hand, which reads through the contender's caches, `chunk` tokens at a time.

    Texts of a batch are padded at their right for likelihoods: what stands there comes in later chunks or later in the
    same one, and changes nothing before it. The logits of a whole text are held, as in `HFLM`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        contender: Contender,
        chunk: int,
        batch_size: int = 1,
    ):
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.contender, self.chunk = contender, chunk
        self.longest = 0  # tokens of a text, the longest so far
        self.elements = self.coded_elements = 0  # of all caches so far
        self.coded_bits = 0.0

    @property
    def bits_per_element(self) -> float | None:
        """Of all that was coded, overheads included; None where nothing was."""
        return self.coded_bits / self.coded_elements if self.coded_elements else None

    @property
    def coded(self) -> float | None:
        """Which share of all elements was coded; None for a cache that does not tell."""
        return self.coded_elements / self.elements if self.elements else None

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits [B, N, vocabulary] of ids [B, N]. Raises ValueError for an encoder-decoder's arguments."""
        if attn_mask is not None or labels is not None:
            raise ValueError("a cache is measured on decoder-only models; this one is called as an encoder-decoder")
        cache = self.contender.make(self.model.config)
        with torch.inference_mode(), self.contender.attending(self.model):
            parts = [
                self.model(piece, past_key_values=cache, use_cache=True).logits
                for piece in inps.split(self.chunk, dim=1)
            ]
        self._count(cache)
        return torch.cat(parts, dim=1)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Ids [B, max_length at most] of contexts [B, N] and what the model adds to them."""
        cache = self.contender.make(self.model.config)
        with self.contender.attending(self.model):
            ids = super()._model_generate(
                context, max_length, stop, past_key_values=cache, prefill_chunk_size=self.chunk, **options
            )
        self._count(cache)
        return ids

    def _count(self, cache: Cache) -> None:
        self.longest = max(self.longest, cache.get_seq_length())
        if isinstance(cache, CompressedCache):
            report = cache.memory()
            self.elements += report.elements
            self.coded_elements += report.coded_elements
            self.coded_bits += report.bits_per_element * report.coded_elements if report.coded_elements else 0.0
