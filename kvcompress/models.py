"""The embedded model: a 4.7M-parameter Llama that ships with the package, so that everything runs on a fresh machine.

Trained by `python -m benchmarks.embedded.train`, measured by `python -m benchmarks.embedded.report`; a toy for trying
and testing, not a language model to use.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path(__file__).with_name("embedded")


def embedded(dtype: torch.dtype = torch.float32) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The model (5 layers, 4 query and 2 KV heads of 64, trained to 4608 tokens) in eval mode, and its tokenizer."""
    model = LlamaForCausalLM.from_pretrained(FOLDER, dtype=dtype, local_files_only=True)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(FOLDER, local_files_only=True)
