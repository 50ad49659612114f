"""What codecs learn once, in a file: means and bases of every layer, so that a cache need not learn them from a prompt.

A safetensors file with a tensor `LAYER.SIDE.NAME` [1, H, ...] for all that the codec of that side learned, and in its
metadata a version and the codecs that learned it. `kvcompress calibrate --basis FILE` writes one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvcompress.codecs import SIDES, Fit, within

VERSION = "2"  # of what is stored of a fit, whose matrices are packed


@dataclass(frozen=True)
class Basis:
    """What was learned of one layer: its codecs, as strings, and the fits [1, H, ...] of keys and of values."""

    codecs: tuple[str, str]
    fits: tuple[Fit, Fit]

    def check(self, index: int, codecs: tuple[str, str]) -> None:
        """Raises ValueError where the layer's codecs are not those that learned this."""
        for side, own, wanted in zip(SIDES, self.codecs, codecs, strict=True):
            if own != wanted:
                raise ValueError(f"the basis of layer {index} was learned by {own} for {side}s, the spec says {wanted}")

    def to(self, device: torch.device) -> tuple[Fit, Fit]:
        """The fits on a device."""
        key, value = ({name: x.to(device) for name, x in fit.items()} for fit in self.fits)
        return key, value


def named(prefix: str, fits: tuple[Fit, ...]) -> dict[str, Tensor]:
    """What was learned of keys and of values, as PREFIX.SIDE.NAME."""
    return {f"{prefix}.{side}.{name}": x for side, fit in zip(SIDES, fits, strict=True) for name, x in fit.items()}


def save(path: str | Path, layers: dict[int, Basis]) -> None:
    """Write the bases of layers, by index."""
    tensors: dict[str, Tensor] = {}
    for index, basis in layers.items():
        tensors |= {name: x.contiguous() for name, x in named(str(index), basis.fits).items()}
    codecs = json.dumps({str(index): basis.codecs for index, basis in layers.items()})
    save_file(tensors, path, {"format": "kvcompress-basis", "version": VERSION, "codecs": codecs})


def load(path: str | Path) -> dict[int, Basis]:
    """The bases by layer. Raises OSError where there is no such file, ValueError where it holds something else."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no basis file {str(path)!r}; `kvcompress calibrate --basis` writes one")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is no safetensors file: {error}") from error
    if (metadata.get("format"), metadata.get("version")) != ("kvcompress-basis", VERSION):
        raise ValueError(f"{str(path)!r} is not a basis file of version {VERSION}, as `kvcompress calibrate` writes it")
    layers = {}
    for index, codecs in json.loads(metadata["codecs"]).items():
        own = [within(tensors, f"{index}.{side}.") for side in SIDES]
        layers[int(index)] = Basis((codecs[0], codecs[1]), (own[0], own[1]))
    return layers
