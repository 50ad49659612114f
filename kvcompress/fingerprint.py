"""Which weights a model has, as one string: what says whether a cache that another process made goes with it.

A fixed sample of every tensor's elements is hashed, so that a model of billions of parameters takes moments:
fine-tuning any one layer changes nearly all elements of its matrices.
"""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.persist import model_fields

SAMPLED = 512  # elements of each tensor, both ends included


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256, in hex, of names, dtypes, shapes and sampled elements of all that the model's state holds.

    So of parameters and buffers, quantised ones (bitsandbytes) with their scales; and of the config's geometry and
    RoPE. Equal in every process, on every device and with any attention. Neither an adapter that is there and switched
    off nor what the config says of activations and norms is told apart. Raises ValueError for a model that has no
    weights at hand (meta device, or offloaded by accelerate).
    """
    config = model.config.get_text_config(decoder=True)
    digest = hashlib.sha256(json.dumps([type(model).__name__, model_fields(config)]).encode())
    for name, x in sorted(model.state_dict().items()):
        if isinstance(x, Tensor):  # a module may put anything into its state
            if x.is_meta:
                raise ValueError(
                    f"{name} of {type(model).__name__} is on the meta device: which weights it has is open"
                )
            digest.update(json.dumps([name, str(x.dtype), list(x.shape)]).encode())
            digest.update(_sample(x).numpy().data)
    return digest.hexdigest()


def _sample(x: Tensor) -> Tensor:
    """Elements of a tensor at fixed places in even steps, as bytes on the CPU."""
    flat = x.detach().reshape(-1)
    if len(flat) > SAMPLED:
        places = torch.arange(SAMPLED, dtype=torch.int64) * (len(flat) - 1) // (SAMPLED - 1)
        flat = flat[places.to(flat.device)]
    return flat.cpu().contiguous().view(torch.uint8)
