"""Attention with its log-sum-exp by PyTorch's fused kernel for CPUs, which never holds the scores."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

FEWEST = 64  # queries: of a chunk, not of a decode step


def takes(query: Tensor) -> bool:
    """Whether `attend` is for queries [B, H, n, D]: many, on a CPU."""
    return query.device.type == "cpu" and query.shape[2] >= FEWEST


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Every query [B, H, n, R_k] attends every token, [B, H or 1, T, R_k] and [B, H or 1, T, R_v], T at least 1.

    Returns (weighted mean [B, H, n, R_v], log-sum-exp [B, H, n, 1]).
    """
    # one head's codes may stand for all heads (jointrank), which the kernel does not look for
    key, value = (x.expand(*query.shape[:2], -1, -1) for x in (key, value))
    width, own = query.shape[-1], value.shape[-1]
    if own < width:
        value = pad(value, (0, width - own))
    elif own > width:
        query, key = pad(query, (0, own - width)), pad(key, (0, own - width))
    mean, log = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scaling)
    return mean[..., :own], log.unsqueeze(-1)
