"""The model that is measured: the embedded one, or the user's."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kvcompress import models


def load(name: str | None, load_in_4bit: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer of a folder or hub id, None for the embedded one; on the GPU where there is one.

    On a CPU it is loaded in float32, since half precision runs many times slower there, else in its own dtype.
    load_in_4bit: weights in bitsandbytes' NF4, so that a big model's cache dominates. Raises OSError where nothing is
    found under `name`.
    """
    on_gpu = torch.cuda.is_available()
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    if name is None:
        if load_in_4bit:
            raise ValueError("--load-in-4bit is for a --model; the embedded one is small")
        model, tokenizer = models.embedded()
    else:
        dtype = "auto" if on_gpu else torch.float32
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **_quantised(load_in_4bit)).eval()
        tokenizer = AutoTokenizer.from_pretrained(name)
    if on_gpu and not load_in_4bit:
        torch.nn.Module.cuda(model)
    return model, tokenizer


def described(name: str | None, model: PreTrainedModel) -> str:
    """The model that was loaded under `name`, its dtype and its device, for titles."""
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "CPU"
    return f"{name or 'embedded model'}, {str(model.dtype).removeprefix('torch.')}, on {device}"


def _quantised(load_in_4bit: bool) -> dict[str, Any]:
    """The arguments of `from_pretrained` for weights of 4 bits, which then go to their device by themselves."""
    if not load_in_4bit:
        return {}
    compute = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    return {"quantization_config": config, "device_map": "auto"}
