"""The geometries of `python -m benchmarks memory`: configs of published models, without their weights.

`geometries/*.json` hold what the models' own config.json say of their sizes. gemma-3-4b-text is the text part of
gemma-3-4b; gpt-oss-20b is published with experts of about 4 bits a parameter, which its config does not enter into.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from benchmarks.caches import Contender
from kvcompress import plan
from kvcompress.layer import CompressedLayer
from kvcompress.planning import load_config

FOLDER = Path(__file__).parent / "geometries"


@dataclass(frozen=True)
class Geometry:
    """A model's sizes: its config's text part, weights to count, KV heads of `width` dimensions in every layer."""

    name: str
    config: PreTrainedConfig
    parameters: int
    heads: int
    width: int
    layers: int

    def uncompressed(self, layers: int, tokens: int) -> int:
        """Bytes of so many layers' keys and values in bfloat16 if all of them are kept."""
        return 2 * layers * 2 * self.heads * self.width * tokens


def names() -> list[str]:
    """The shipped geometries."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


@cache
def load(name: str) -> Geometry:
    """A shipped geometry, or that of a model folder, config.json or hub id (with a slash in it).

    Raises OSError where there is none, ValueError for a model whose layers are not all full or sliding attention of one
    size, the only ones that can be filled without running it.
    """
    shipped = FOLDER / f"{name}.json"
    if not shipped.exists() and "/" not in name and not Path(name).exists():
        raise ValueError(f"unknown geometry {name!r}; known: {', '.join(names())}, or a model folder or hub id")
    whole = load_config(shipped if shipped.exists() else name)
    config = whole.get_text_config(decoder=True)
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    if kinds - {DynamicLayer, DynamicSlidingWindowLayer} or getattr(config, "kv_lora_rank", None) is not None:
        said = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"{name}: only layers of full or sliding attention can be filled, this model has {said}")
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    parameters = plan(whole, context=1024, spec="exact").parameters
    return Geometry(name, config, parameters, config.num_key_value_heads, width, config.num_hidden_layers)


@dataclass(frozen=True)
class Kind:
    """Layers that hold their tokens alike. label: their sizes and how they hold; dense: all tokens, or all decoded."""

    label: str
    layers: tuple[int, ...]
    dense: bool


def layer_kinds(geometry: Geometry, contender: Contender) -> list[Kind]:
    """The kinds of layers in a cache, sliding ones first; raises ValueError where it does not take this model."""
    found: dict[tuple[bool, bool, str], list[int]] = {}
    for index, layer in enumerate(contender.make(geometry.config).layers):
        sliding, coded = isinstance(layer, DynamicSlidingWindowLayer), isinstance(layer, CompressedLayer)
        how = f"{geometry.heads} x {geometry.width}, {_how(contender, layer)}"
        found.setdefault((not sliding, not sliding and not coded, how), []).append(index)
    return [Kind(label, tuple(layers), dense) for (_, dense, label), layers in sorted(found.items())]


def _how(contender: Contender, layer: Any) -> str:
    if isinstance(layer, DynamicSlidingWindowLayer):
        return f"sliding window of {layer.sliding_window}"
    if isinstance(layer, CompressedLayer):
        return str(replace(layer.spec, key=layer.codecs.key, value=layer.codecs.value, layers={}))
    return contender.name
