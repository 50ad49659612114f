"""A cache in a file: a safetensors file, with JSON in its metadata. Nothing that a file holds is ever executed.

    metadata   format, version, and `cache`, JSON: {"model", "dtypes", "spec", "layers": [the facts of every layer]}
    tensors    INDEX.NAME for each layer's tensors, as `kvcompress.state` names them

A file is whole or not there: it is written beside its place and moved there last.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from kvcompress.spec import CacheSpec
from kvcompress.state import State, put, take

FORMAT = "kvcompress-cache"
#: Of this layout and of what codes mean: to be raised when a codec's bits come to stand for something else.
VERSION = "3"

#: The fields of a model's config that decide what its cache holds; a file goes with one model's.
MODEL_FIELDS = (
    "model_type num_hidden_layers layer_types hidden_size num_attention_heads num_key_value_heads head_dim "
    "num_kv_shared_layers global_head_dim num_global_key_value_heads kv_lora_rank qk_rope_head_dim "
    "sliding_window attention_chunk_size rope_parameters"
).split()


def save(path: str | Path, config: PreTrainedConfig, spec: CacheSpec, layers: Sequence[Any]) -> None:
    """Write a cache's layers; see `CompressedCache.save`. config: the text part's."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path.parent)!r} to write {path.name!r} to")
    _check_finished(layers)
    states = [take(index, layer) for index, layer in enumerate(layers)]
    tensors = {f"{index}.{name}": x for index, state in enumerate(states) for name, x in state.tensors.items()}
    dtypes = {_dtype(x.dtype) for x in (config, *layers) if getattr(x, "dtype", None) is not None}
    content = {
        "model": _model(config),
        "dtypes": sorted(dtypes),
        "spec": json.loads(spec.to_json()),
        "layers": [state.facts for state in states],
    }
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        save_file(tensors, beside, {"format": FORMAT, "version": VERSION, "cache": json.dumps(content)})
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load(
    path: str | Path, config: PreTrainedConfig, device: torch.device | str | None
) -> tuple[CacheSpec, list[State]]:
    """A cache's spec and its layers' states, on a device; see `CompressedCache.load`. config: the text part's."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no cache file {str(path)!r}; CompressedCache.save writes one")
    device = torch.get_default_device() if device is None else torch.device(device)
    try:
        with safe_open(str(path), framework="pt") as file:
            content = _content(path, file.metadata() or {})
            _check_model(path, content, config)
            spec = CacheSpec.from_json(json.dumps(content["spec"]))
            states = [State(facts=facts) for facts in content["layers"]]
            for key in file.keys():  # noqa: SIM118  (it is no dict)
                index, name = key.split(".", 1)
                states[int(index)].tensors[name] = file.get_tensor(key).to(device, copy=True)  # may be a mapped file's
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is no safetensors file, or is cut short: {error}") from error
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} does not hold what its metadata say: {error!r}") from error
    return spec, states


def restore(path: str | Path, layers: Sequence[Any], states: Sequence[State]) -> None:
    """Make new layers hold what was saved; raises ValueError for a layer whose state does not hold together."""
    if len(layers) != len(states):
        raise ValueError(f"{str(path)!r} holds {len(states)} layers, the model has {len(layers)}")
    for index, (layer, state) in enumerate(zip(layers, states, strict=True)):
        try:
            put(layer, state)
        except ValueError as error:
            raise ValueError(f"layer {index} of {str(path)!r} cannot be loaded: {error}") from error


def _check_finished(layers: Sequence[Any]) -> None:
    """Raises ValueError where layers hold different numbers of tokens."""
    held = {index: layer.get_seq_length() for index, layer in enumerate(layers) if isinstance(layer, CacheLayerMixin)}
    most, least = max(held, key=held.__getitem__), min(held, key=held.__getitem__)
    if held[most] != held[least]:
        raise ValueError(
            f"layer {most} holds {held[most]} tokens, layer {least} {held[least]}: a forward pass is under way or was "
            "broken off; save after it, or rollback() first"
        )


def _content(path: str | Path, metadata: dict[str, str]) -> dict[str, Any]:
    """What the metadata says; raises ValueError for another kind of file or another version."""
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{str(path)!r} is no saved cache: its format is {metadata.get('format')!r}, that of a cache {FORMAT!r}"
        )
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{str(path)!r} is of version {metadata.get('version')!r}, this kvcompress reads version {VERSION!r}"
        )
    content = json.loads(metadata.get("cache", "null"))
    if not isinstance(content, dict) or not {"model", "dtypes", "spec", "layers"} <= content.keys():
        raise ValueError(f"{str(path)!r} does not say what it holds: its metadata have no complete `cache`")
    return content


def _check_model(path: str | Path, content: dict[str, Any], config: PreTrainedConfig) -> None:
    """Raises ValueError where a cache was another model's."""
    saved, own = content["model"], _model(config)
    for name in MODEL_FIELDS:
        if saved.get(name) != own[name]:
            raise ValueError(
                f"{str(path)!r} is the cache of another model: its {name} is {saved.get(name)!r}, "
                f"that of the config {own[name]!r}"
            )
    if config.dtype is not None and content["dtypes"] and _dtype(config.dtype) not in content["dtypes"]:
        raise ValueError(
            f"{str(path)!r} holds {' and '.join(content['dtypes'])}, the config says {_dtype(config.dtype)}"
        )


def _model(config: PreTrainedConfig) -> dict[str, Any]:
    fields = {name: getattr(config, name, None) for name in MODEL_FIELDS}
    result: dict[str, Any] = json.loads(json.dumps(fields, default=str))
    return result


def _dtype(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")
