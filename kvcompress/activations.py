"""What a model's own tensors take while a chunk of the prompt passes through it, beside weights and cache.

The forward pass runs on the meta device, where tensors have shapes and no numbers, and the bytes that are alive are
counted after every operation. Attention and the experts' grouped products allocate there what they return (experts
also their intermediate results); the workspace of our attention and of the encoders is bounded, does not grow with the
context, and is not counted, nor is what a library allocates within an operation. Linear-attention layers count as
transformers' own PyTorch code computes them, which takes more than their CUDA kernels do.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvcompress.tracing import first_line, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NAME = "kvcompress-shapes"


def chunk_bytes(model: Any, config: PreTrainedConfig, batch: int, chunk: int) -> int:
    """Bytes at the peak of a chunk [batch, chunk] of a prompt, only the last token's logits being wanted.

    model: on the meta device, in eval mode; how it attends is changed. Exact keys and values of one layer are part of
    it. `pytest tests/test_planning.py -k peak` holds it against real prefills. Raises ValueError where the model cannot
    be traced with its attention replaced.
    """
    from transformers import AttentionInterface, DynamicCache
    from transformers.integrations.moe import ExpertsInterface
    from transformers.masking_utils import AttentionMaskInterface

    class Passing(DynamicCache):
        """Hands a chunk's keys and values through, and keeps none."""

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            return key_states, value_states

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    ExpertsInterface.register(NAME, _experts)
    with quiet(), torch.device("meta"), torch.no_grad():
        try:
            model.set_attn_implementation(NAME)
            model.set_experts_implementation(NAME)
            ids, cache = torch.zeros(batch, chunk, dtype=torch.int64), Passing(config=config)
            with _Alive([*model.parameters(), *model.buffers()]) as alive:
                model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        except Exception as error:  # any of a model's own
            raise ValueError(f"cannot trace a chunk of {config.model_type}: {first_line(error)}") from error
    return alive.peak


class _Alive(TorchDispatchMode):
    """Counts the bytes of tensors that operations made and that are alive; `held` ones are not counted."""

    def __init__(self, held: list[Tensor]):
        super().__init__()
        self.bytes = self.peak = 0
        self.sizes = {x.untyped_storage()._cdata: 0 for x in held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (address := tensor.untyped_storage()._cdata) not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[address] = storage.nbytes()
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._free, address)
        self.peak = max(self.peak, self.bytes)
        return out

    def _free(self, address: int) -> None:
        self.bytes -= self.sizes.pop(address)


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """[B, H, Q, D] to an output [B, Q, H, D_v], as attention without stored scores makes it."""
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def _no_mask(*_: Any, **__: Any) -> None:
    """Ours needs none where a chunk is plainly causal."""


def _experts(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Tokens [T, D] sent to the experts index [T, k], with what transformers' grouped products allocate for them."""
    pairs, width = index.numel(), hidden.shape[-1]
    up = module.gate_up_proj if module.has_gate else module.up_proj
    chosen = hidden.new_empty(pairs, width)
    projected = hidden.new_empty(pairs, up.numel() // (up.shape[0] * width))
    gated = projected.new_empty(pairs, projected.shape[1] // (2 if module.has_gate else 1))
    results = [torch.empty_like(chosen) for _ in ("products", "weighted")]
    del projected, gated, results  # held until here, as there
    return torch.empty_like(hidden)
