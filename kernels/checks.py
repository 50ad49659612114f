"""What the launch functions of this folder refuse: tensors that do not belong together."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], at: torch.device) -> None:
    """ValueError unless the tensor has this shape, one of these dtypes, and lies on this device."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be one of {', '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.device != at:
        raise ValueError(f"{name} must lie on {at} as the others do, got {tensor.device}")


def check_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, int, int, int, int]:
    """(B, H, G, Q, T) of query [B, H*G, Q, D], key [B, H, T, D], value [B, H, T, Dv]; ValueError where they misfit."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must have 4 dimensions [B, heads, tokens, width], got {tuple(tensor.shape)}")
    if query.dtype not in DTYPES:
        raise ValueError(f"query must be one of {', '.join(map(str, DTYPES))}, got {query.dtype}")
    B, heads, Q, D = query.shape
    H, T = key.shape[1:3]
    if not H or heads % H:
        raise ValueError(f"query heads must be a multiple of the KV heads, got {heads} and {H}")
    check("key", key, (B, H, T, D), (query.dtype,), query.device)
    check("value", value, (B, H, T, value.shape[3]), (query.dtype,), query.device)
    return B, H, heads // H, Q, T


def check_rows(name: str, tensor: Tensor) -> None:
    """ValueError unless the last dimension is contiguous: the kernels address it without a stride."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}")


def outputs(
    into: tuple[Tensor, Tensor] | None, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor
) -> tuple[Tensor, Tensor]:
    """(out of this shape and dtype, float32 log-sum-exp of it without the width): new ones, or those given, checked."""
    if into is None:
        return like.new_empty(shape, dtype=dtype), like.new_empty(shape[:-1], dtype=torch.float32)
    check("into[0]", into[0], shape, (dtype,), like.device)
    check("into[1]", into[1], shape[:-1], (torch.float32,), like.device)
    check_rows("into[0]", into[0])
    check_rows("into[1]", into[1])
    return into
