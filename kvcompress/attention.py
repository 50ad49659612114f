"""The bridge to transformers: handles that stand for a layer's keys and values, and the attention that takes them.

`CompressedLayer.update` returns two `KVHandle`s. The attention function registered as "kvcompress" recognises them and
attends on the codes; any other operation on a handle materialises it, which is right but slow, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.pytorch_utils import Conv1D

from kvcompress.reference import Mask, Scores, attend

NAME = "kvcompress"

#: Gives, for KV heads and a value width, the metric [heads, width, width] of errors of values; None where unknown.
OutputMetric = Callable[[int, int], Tensor | None]


class HandleOwner(Protocol):
    """What a handle needs of the cache layer that made it."""

    def attend(self, query: Tensor, mask: Tensor | None, scores: Scores, output_metric: OutputMetric) -> Tensor: ...

    def materialise(self, side: int) -> Tensor: ...

    def undo(self) -> None: ...

    @property
    def layer_count(self) -> int: ...


class KVHandle(torch.Tensor):
    """Stands for a layer's keys (side 0) or values (1), [B, H, columns, D]; any tensor operation materialises it."""

    owner: HandleOwner
    side: int

    @staticmethod
    def __new__(cls, owner: HandleOwner, side: int, shape: tuple[int, ...], like: Tensor) -> KVHandle:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)

    def __init__(self, owner: HandleOwner, side: int, shape: tuple[int, ...], like: Tensor):
        self.owner, self.side = owner, side

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*tree_map(_materialised, args), **tree_map(_materialised, kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"KVHandle({('key', 'value')[self.side]}, shape={tuple(self.shape)}, dtype={self.dtype})"


def _materialised(x: Any) -> Any:
    return x.owner.materialise(x.side) if isinstance(x, KVHandle) else x


def _owner_of(key: Tensor, value: Tensor) -> HandleOwner | None:
    """The layer whose keys and values these are the handles of; None where they are anything else."""
    if not isinstance(key, KVHandle) or not isinstance(value, KVHandle):
        return None
    return key.owner if key.owner is value.owner and (key.side, value.side) == (0, 1) else None


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of our attention, as small as it can be: None where plainly causal, bool [B, KV] where only padding is
    added, so that a million columns cost a million bytes; everything else as transformers' 4D bool mask.
    """
    ends_apart = kwargs.get("q_offset", 0) + q_length != kwargs.get("kv_offset", 0) + kv_length  # as in a static cache
    # a model that goes on to work on the mask does not allow the short forms
    may_skip = kwargs.pop("allow_is_causal_skip", True) and not ends_apart
    if not may_skip or mask_function is not causal_mask_function:
        kwargs |= {"mask_function": mask_function, "attention_mask": attention_mask, "allow_is_causal_skip": may_skip}
        return sdpa_mask(batch_size, q_length, kv_length, **kwargs)
    if attention_mask is None:
        return None
    real = attention_mask.bool()
    padded = nn.functional.pad(real, (0, max(kv_length - real.shape[1], 0)), value=True)[:, :kv_length]
    return None if bool(padded.all()) else padded


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B, H*G, Q, D] to (output [B, Q, H*G, D_v], None).

    On the codes where key and value are handles of one layer, else plainly on the tensors (materialising handles).
    Raises ValueError for dropout, which a cache has no use for.
    """
    if dropout:
        if isinstance(key, KVHandle):
            key.owner.undo()
        raise ValueError(f"attention dropout must be 0 with the {NAME!r} attention (call model.eval()), got {dropout}")
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    owner = _owner_of(key, value)
    if owner is not None:
        layers = getattr(getattr(module, "config", None), "num_hidden_layers", owner.layer_count)
        if layers != owner.layer_count:
            owner.undo()
            raise ValueError(f"this cache was made for {owner.layer_count} layers, the model has {layers}")
        return owner.attend(query, attention_mask, scores, partial(output_metric, module)), None
    key, value = _materialised(key), _materialised(value)
    causal = getattr(module, "is_causal", True) and query.shape[2] > 1
    return attend(query, None, key, value, as_mask(attention_mask, causal), scores), None


def output_metric(module: nn.Module, heads: int, width: int) -> Tensor | None:
    """W_o^T W_o of each KV head's values, summed over its query heads, float32 [heads, width, width].

    By it an error of an attention module's values [.., heads, .., width] reaches the residual stream. None where the
    output projection is not found among its usual names, or is no plain matrix (quantised).
    """
    for name in ("o_proj", "out_proj", "dense", "c_proj"):
        projection = getattr(module, name, None)
        with _at_hand(projection):
            weight = getattr(projection, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point() and not weight.is_meta:
                weight = weight.to_local() if isinstance(weight, DTensor) else weight  # this rank's heads
                weight = weight.detach().float()
                weight = weight if isinstance(projection, Conv1D) else weight.mT  # Conv1D keeps its transpose
                if weight.shape[0] % (heads * width) == 0:
                    split = weight.view(heads, -1, width, weight.shape[1])
                    return torch.einsum("hgdo,hgeo->hde", split, split)
    return None


@contextmanager
def _at_hand(module: nn.Module | None) -> Iterator[None]:
    """Within it weights of a module that accelerate keeps elsewhere (CPU, disk) are where the module computes."""
    if not hasattr(module, "_hf_hook"):
        yield
        return
    from accelerate.utils import align_module_device  # which is installed: the hook is its own

    with align_module_device(module):
        yield


def as_mask(tensor: Tensor | None, causal: bool) -> Mask:
    """A mask as transformers hands it over: none, bool [B, columns], or 4D (bool, or added to the scores)."""
    if tensor is not None and tensor.ndim not in (2, 4):
        raise ValueError(f"the attention mask must have 2 or 4 dimensions, got shape {tuple(tensor.shape)}")
    return Mask(tensor, causal and (tensor is None or tensor.ndim == 2))


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, mask_function)
