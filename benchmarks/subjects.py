"""The model that is measured: the embedded one, or the user's."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvcompress import models


def load(name: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer of a folder or hub id, None for the embedded one; on the GPU where there is one.

    On a CPU it is loaded in float32, since half precision runs many times slower there, else in its own dtype.
    Raises OSError where nothing is found under `name`.
    """
    on_gpu = torch.cuda.is_available()
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    if name is None:
        model, tokenizer = models.embedded()
    else:
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto" if on_gpu else torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(name)
    if on_gpu:
        torch.nn.Module.cuda(model)
    return model, tokenizer
