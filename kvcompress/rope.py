"""Rotary position embedding (RoPE) of cached keys, undone and applied again with a model's own code.

A model's modelling module, found from its config's class, holds the module that gives the cosines and sines of
positions and the function that applies them. A rotation by the negative angle undoes one; where the embedding also
scales (YaRN) its square is divided out of the rotated dimensions. What is undone on writing is applied on reading, so
that frequencies that are not quite the model's (kinds that change with the length are held as they are at first) or
positions that are off by a constant do no harm but to how alike the keys become.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from kvcompress.planes import Planes, planes_of

logger = logging.getLogger(__name__)

#: Models that rotate the keys of sliding layers only, which no field of their configs says.
UNROTATED_WHERE_FULL = frozenset({"afmoe", "cohere2", "exaone4", "exaone_moe", "flint", "kolibri1"})


def rotates(config: PreTrainedConfig, layer: int) -> bool:
    """Whether a layer's keys have a rotary position embedding."""
    if not getattr(config, "rope_parameters", None):
        return False
    listed = getattr(config, "no_rope_layers", None)  # SmolLM3: 0 for a layer without
    if listed:
        return bool(listed[layer])
    if config.model_type not in UNROTATED_WHERE_FULL or getattr(config, "sliding_window", None) is None:
        return True
    return bool(config.layer_types[layer] != "full_attention")


class Rope:
    """The rotation of one model's keys of `width` dimensions; raises ValueError where it cannot be undone."""

    @classmethod
    def of(cls, config: PreTrainedConfig, width: int, layer: int = 0) -> Rope | None:
        """The rotation of a layer's keys; None where they have none, or, which is logged, none that can be undone."""
        if not rotates(config, layer):
            return None
        try:
            return cls(config, width)
        except ValueError as error:
            logger.warning("%s; they are coded with it", error)
            return None

    def __init__(self, config: PreTrainedConfig, width: int):
        try:  # a model from elsewhere may have another module, or an embedding that is made otherwise
            module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
            kinds = [x for n, x in vars(module).items() if n.endswith("RotaryEmbedding") and isinstance(x, type)]
            (kind,) = kinds
            self._function: Callable[..., Any] = module.apply_rotary_pos_emb
            self._embedding: Any = kind(config=config)
            layered = isinstance(self._embedding.rope_type, dict)
        except Exception as error:
            what = f"the RoPE of {config.model_type} cannot be taken out of its keys: it has no usual form"
            raise ValueError(what) from error
        self._layer_type = ("full_attention",) if layered else ()
        held = dict.fromkeys(self._embedding.rope_type, "default") if layered else "default"
        self._embedding.rope_type = held  # dynamic kinds would change their frequencies between writing and reading
        self._width = width
        self._probe(config, width)

    def _probe(self, config: PreTrainedConfig, width: int) -> None:
        """Raises ValueError unless a rotation is undone to float32's precision."""
        cpu = torch.device("cpu")  # whatever the default device and dtype are
        key = torch.randn(
            1, 1, 4, width, generator=torch.Generator(cpu).manual_seed(0), dtype=torch.float32, device=cpu
        )
        positions = torch.tensor([[0, 1, 77, 1000]], device=cpu)
        try:
            undone = torch.allclose(self.undo(self.apply(key, positions), positions), key, atol=1e-4)
        except Exception:  # of a model's own code, for keys that are not of the form it rotates (MLA)
            undone = False
        if not undone:
            raise ValueError(f"the RoPE of {config.model_type} cannot be taken out of its keys: it cannot be undone")

    def _angles(self, key: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(self._embedding, nn.Module)
        self._embedding.to(key.device)
        cos, sin = self._embedding(key, positions, *self._layer_type)
        return cos, sin

    @cached_property
    def planes(self) -> Planes | None:
        """The rotation as kernels want it, on the CPU; None where it is of another kind."""
        known = [x for name, x in self._embedding.named_buffers() if name.endswith("inv_freq")]
        with torch.inference_mode(False), torch.no_grad():
            return planes_of(self, torch.cat(known).float().cpu(), self._width) if known else None

    def apply(self, key: Tensor, positions: Tensor) -> Tensor:
        """Rotate keys float32 [B, H, T, D] to positions int64 [B, T]."""
        cos, sin = self._angles(key, positions)
        turned: Tensor = self._function(key, key, cos, sin)[0]
        return turned

    def undo(self, key: Tensor, positions: Tensor) -> Tensor:
        """The inverse of `apply`."""
        cos, sin = self._angles(key, positions)
        scale = cos.square() + sin.square()  # 1 but for YaRN
        turned: Tensor = self._function(key, key, cos / scale, -sin / scale)[0]
        return turned
