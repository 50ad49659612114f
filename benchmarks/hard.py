"""A hard variant of a model: the same function, reparametrised so that its keys and values have outlier channels.

A rotary pair of key channels (i, i + D/2) of a KV head is scaled by s and the same pair of its query heads by 1/s; a
value channel is scaled by s and its columns of the output projection by 1/s. Rotations act within a pair, so scores and
outputs stay as they were, while the cache holds channels that differ up to 30 times in size, as those of published
models do. s is drawn log-uniformly for each pair and for each channel.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

#: s is drawn from 1 to this.
LARGEST = 30.0

#: How far logits may move, as a share of the largest (rounding only), by bytes of an element of the weights.
TOLERANCE = {4: 1e-3, 2: 1e-1}


def harden(model: PreTrainedModel, seed: int, largest: float = LARGEST) -> PreTrainedModel:
    """A changed deep copy of a Llama-like model (full rotary embedding in halves; biases are scaled with their rows).

    Raises ValueError for a model with norms on its queries or keys, without separate q, k, v and o projections, or
    whose logits do not stay the same (another layout of rotary pairs).
    """
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for attention in attentions(changed):
            _harden(attention, generator, largest)
    _check_same(model, changed)
    return changed


def attentions(model: PreTrainedModel) -> list[Any]:
    """The attention modules of a Llama-like model; raises ValueError for any other."""
    layers: Any = getattr(model.base_model, "layers", None)
    found = [getattr(layer, "self_attn", None) for layer in layers or []]
    kind = type(model).__name__
    if not found:
        raise ValueError(f"{kind} has no list of layers: only Llama-like models can be hardened")
    for attention in found:
        absent = [name for name in ("q_proj", "k_proj", "v_proj", "o_proj") if not _is_linear(attention, name)]
        if absent:
            raise ValueError(f"{kind} has no linear {absent[0]}: only Llama-like models can be hardened")
        norms = [name for name in ("q_norm", "k_norm") if getattr(attention, name, None) is not None]
        if norms:
            raise ValueError(f"{kind} has a {norms[0]}, which would undo the scaling: it cannot be hardened this way")
    return found


def _is_linear(attention: Any, name: str) -> bool:
    return isinstance(getattr(attention, name, None), nn.Linear)


def draw(shape: tuple[int, ...], generator: torch.Generator, largest: float) -> Tensor:
    """Log-uniform on [1, largest], float32."""
    return torch.exp(torch.rand(shape, generator=generator) * math.log(largest))


def _harden(attention: Any, generator: torch.Generator, largest: float) -> None:
    width = attention.head_dim
    heads = attention.k_proj.out_features // width
    groups = attention.q_proj.out_features // (heads * width)
    pairs = draw((heads, width // 2), generator, largest).repeat(1, 2)  # [H, D]: channels i and i + D/2 alike
    channels = draw((heads, width), generator, largest)
    _scale_rows(attention.k_proj, pairs.flatten())
    _scale_rows(attention.q_proj, 1 / pairs.repeat_interleave(groups, dim=0).flatten())
    _scale_rows(attention.v_proj, channels.flatten())
    weight = attention.o_proj.weight
    weight.mul_((1 / channels.repeat_interleave(groups, dim=0).flatten()).to(weight))


def _scale_rows(projection: nn.Linear, factors: Tensor) -> None:
    projection.weight.mul_(factors.to(projection.weight).unsqueeze(1))
    if projection.bias is not None:
        projection.bias.mul_(factors.to(projection.bias))


@torch.inference_mode()
def _check_same(model: PreTrainedModel, changed: PreTrainedModel) -> None:
    ids = torch.arange(16, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
    before, after = (each(ids, use_cache=False).logits.float() for each in (model, changed))
    moved = ((before - after).abs().max() / before.abs().max()).item()
    if not moved <= TOLERANCE[min(model.dtype.itemsize, 4)]:
        raise ValueError(
            f"{type(model).__name__} does not stay the same function (logits moved by {moved:.1%}): its rotary pairs "
            "are not the channels (i, i + D/2) of the whole head"
        )
