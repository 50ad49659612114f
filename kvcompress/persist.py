"""A cache in a file: a safetensors file, with JSON in its metadata. Nothing that a file holds is ever executed.

    metadata   format, version; `cache`, JSON: {"model", "dtypes", "spec", "layers": [the facts of every layer],
               "notes"}; and sha256, over all else (`checksum`)
    tensors    INDEX.NAME for each layer's tensors, as `kvcompress.state` names them; note.NAME for what a caller adds

A file is whole or not there: it is written beside its place and moved there last. What it says is believed only as far
as it holds together; nothing in it names another file that would be read: a spec's `basis` only says where what the
file itself holds once came from.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import reprlib
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from kvcompress.spec import CacheSpec
from kvcompress.state import State, put, take

FORMAT = "kvcompress-cache"
#: Of this layout and of what codes mean: to be raised when a codec's bits come to stand for something else.
VERSION = "4"
HEADER = 4 * 2**20  # bytes at most: the facts of 80 layers of a thousand rows
NOTE = "note"
SAID = 1000  # characters of a message that may quote a file

#: The fields of a model's config that decide what its cache holds; a file goes with one model's.
MODEL_FIELDS = (
    "model_type num_hidden_layers layer_types hidden_size num_attention_heads num_key_value_heads head_dim "
    "num_kv_shared_layers global_head_dim num_global_key_value_heads kv_lora_rank qk_rope_head_dim "
    "sliding_window attention_chunk_size rope_parameters"
).split()


class DamagedError(ValueError):
    """A file that is not as it was written: cut short, or with other bits."""


class ForeignError(ValueError):
    """A file that is no saved cache, or one of another version."""


def save(
    path: str | Path,
    config: PreTrainedConfig,
    spec: CacheSpec,
    layers: Sequence[Any],
    notes: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a cache's layers; see `CompressedCache.save`. config: the text part's.

    notes, tensors: what the file is to hold beside them, for `read_notes`: JSON and tensors by name.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path.parent)!r} to write {path.name!r} to")
    check_finished(layers)
    states = [take(index, layer) for index, layer in enumerate(layers)]
    own = {f"{index}.{name}": x for index, state in enumerate(states) for name, x in state.tensors.items()}
    own |= {f"{NOTE}.{name}": x.cpu().contiguous() for name, x in (tensors or {}).items()}
    dtypes = {_dtype(x.dtype) for x in (config, *layers) if getattr(x, "dtype", None) is not None}
    content = {
        "model": model_fields(config),
        "dtypes": sorted(dtypes),
        "spec": json.loads(spec.to_json()),
        "layers": [state.facts for state in states],
        "notes": dict(notes or {}),
    }
    metadata = {"format": FORMAT, "version": VERSION, "cache": json.dumps(content)}
    metadata["sha256"] = checksum(own, metadata)
    _write(path, own, metadata)


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file that is whole or not there, also after the machine has lost power."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        save_file(tensors, beside, metadata)
        size = _header_bytes(beside)
        if size > HEADER:
            raise ValueError(f"what layers say take {size} bytes, a file has {HEADER} for them; save fewer rows")
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Let what was renamed in a folder last; systems that cannot open one (Windows) see to it themselves."""
    if hasattr(os, "O_DIRECTORY"):
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256, in hex, of the metadata but itself and of all tensors on the CPU: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    digest.update(json.dumps({name: x for name, x in sorted(metadata.items()) if name != "sha256"}).encode())
    for name, x in sorted(tensors.items()):
        digest.update(json.dumps([name, _dtype(x.dtype), list(x.shape)]).encode())
        digest.update(x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load(
    path: str | Path,
    config: PreTrainedConfig,
    device: torch.device | str | None,
    mapped: bool = False,
    verify: bool = True,
    pages_mapped: bool = False,
) -> tuple[CacheSpec, list[State]]:
    """A cache's spec and its layers' states, on a device; see `CompressedCache.load`. config: the text part's.

    pages_mapped: leave pages in the file, whatever the device, for whoever brings them where they belong.
    """
    device = torch.get_default_device() if device is None else torch.device(device)
    if mapped and device.type != "cpu":
        raise ValueError(f"a file is mapped into the memory of the CPU, the cache was to go to {device}")
    tensors, metadata = _opened(path)
    if verify:
        _verify(path, tensors, metadata)
    content = _content(path, metadata)
    try:
        _check_model(path, content, config)
        spec = _spec(path, content["spec"])
        if not isinstance(content["layers"], list) or not all(isinstance(x, dict) for x in content["layers"]):
            raise ValueError(f"{str(path)!r} does not say what its layers hold")
        states = [State(facts=facts, numbers=verify) for facts in content["layers"]]
        for key, x in tensors.items():
            layer, name = _name(path, key, len(states))
            if layer is not None:
                # a mapped tensor is a copy-on-write view of the file
                states[layer].tensors[name] = (
                    x if (mapped or pages_mapped) and name == "pages" else x.to(device, copy=True)
                )
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} does not hold what its metadata say: {error!r}") from error
    return spec, states


def read_notes(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a caller of `save` added, without the rest; nothing is verified. Raises as `load` does."""
    tensors, metadata = _opened(path, f"{NOTE}.")
    notes = _content(path, metadata)["notes"]
    if not isinstance(notes, dict):
        raise ValueError(f"{str(path)!r} does not hold what its metadata say: its notes are {reprlib.repr(notes)}")
    return notes, {name.removeprefix(f"{NOTE}."): x.clone() for name, x in tensors.items()}


def restore(path: str | Path, layers: Sequence[Any], states: Sequence[State]) -> None:
    """Make new layers hold what was saved; raises ValueError for a layer whose state does not hold together."""
    if len(layers) != len(states):
        raise ValueError(f"{str(path)!r} holds {len(states)} layers, the model has {len(layers)}")
    for index, (layer, state) in enumerate(zip(layers, states, strict=True)):
        try:
            put(layer, state)
        except ValueError as error:
            raise ValueError(f"layer {index} of {str(path)!r} cannot be loaded: {str(error)[:SAID]}") from error
    rows = {int(x.shape[0]) for state in states for name, x in state.tensors.items() if name in _ROWS}
    if len(rows) > 1:
        raise ValueError(f"{str(path)!r} contradicts itself: its layers hold {sorted(rows)} rows")
    try:
        check_finished(layers)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} contradicts itself: {error}") from error


#: Tensors of states that have a row for each of the batch.
_ROWS = ("sink.key", "keys", "conv.0", "recurrent.0")


def check_finished(layers: Sequence[Any]) -> None:
    """Raises ValueError where layers hold different numbers of tokens."""
    held = {index: layer.get_seq_length() for index, layer in enumerate(layers) if isinstance(layer, CacheLayerMixin)}
    most, least = max(held, key=held.__getitem__), min(held, key=held.__getitem__)
    if held[most] != held[least]:
        raise ValueError(
            f"layer {most} holds {held[most]} tokens, layer {least} {held[least]}: a forward pass is under way or was "
            "broken off; save after it, or rollback() first"
        )


def _opened(path: str | Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors whose names begin with `prefix`, mapped, and its metadata."""
    if not os.path.isfile(path):  # Path.is_file raises for some names
        raise FileNotFoundError(f"there is no cache file {str(path)!r}; CompressedCache.save writes one")
    size = _header_bytes(path)
    if size > min(HEADER, os.path.getsize(path)):
        raise DamagedError(f"{str(path)!r} is no safetensors file, or is cut short: its header would be {size} bytes")
    try:
        with safe_open(str(path), framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118  (it is no dict)
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise DamagedError(f"{str(path)!r} is no safetensors file, or is cut short: {error}") from error
    except MemoryError as error:  # says nothing of the file, which is to be kept
        raise OSError(errno.ENOMEM, f"{str(path)!r} cannot be mapped into memory: {error}") from error
    except (AttributeError, RuntimeError) as error:  # dtypes that torch does not have, or again no memory to map it
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error


def _header_bytes(path: str | Path) -> int:
    """What a safetensors file says that its header takes."""
    with open(path, "rb") as file:
        return int.from_bytes(file.read(8), "little")


def _verify(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    _check_kind(path, metadata)
    if checksum(tensors, metadata) != metadata.get("sha256"):
        raise DamagedError(f"{str(path)!r} is damaged: what it holds has another checksum than it says")


def _check_kind(path: str | Path, metadata: Mapping[str, str]) -> None:
    """Raises ForeignError for another kind of file or another version."""
    found, version = metadata.get("format"), metadata.get("version")
    if found != FORMAT:
        raise ForeignError(f"{str(path)!r} is no saved cache: its format is {reprlib.repr(found)}, not {FORMAT!r}")
    if version != VERSION:
        raise ForeignError(
            f"{str(path)!r} is of version {reprlib.repr(version)}, this kvcompress reads version {VERSION!r}"
        )


def _content(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the metadata says; raises ValueError where that is not complete."""
    _check_kind(path, metadata)
    try:
        content = json.loads(metadata.get("cache", "null"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} does not say what it holds: its `cache` is no JSON: {error}") from error
    wanted = {"model", "dtypes", "spec", "layers", "notes"}
    if not isinstance(content, dict) or not wanted <= content.keys():
        raise ValueError(f"{str(path)!r} does not say what it holds: its metadata have no complete `cache`")
    return content


def _spec(path: str | Path, content: object) -> CacheSpec:
    try:
        return CacheSpec.from_json(json.dumps(content))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} does not say how it is coded: {str(error)[:SAID]}") from error


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _name(path: str | Path, key: str, layers: int) -> tuple[int | None, str]:
    """The layer (None: a note) and the name of a tensor in a file."""
    index, _, name = key.partition(".")
    if index == NOTE:
        return None, name
    if not re.fullmatch(r"0|[1-9][0-9]{0,5}", index) or int(index) >= layers:
        raise ValueError(f"{str(path)!r} holds a tensor {reprlib.repr(key)}, which is none of its {layers} layers'")
    return int(index), name


def _check_model(path: str | Path, content: dict[str, Any], config: PreTrainedConfig) -> None:
    """Raises ValueError where a cache was another model's."""
    saved, own = content["model"], model_fields(config)
    for name in MODEL_FIELDS:
        if saved.get(name) != own[name]:
            raise ValueError(
                f"{str(path)!r} is the cache of another model: its {name} is {reprlib.repr(saved.get(name))}, "
                f"that of the config {own[name]!r}"
            )
    if config.dtype is not None and content["dtypes"] and _dtype(config.dtype) not in content["dtypes"]:
        raise ValueError(
            f"{str(path)!r} holds {' and '.join(content['dtypes'])}, the config says {_dtype(config.dtype)}"
        )


def model_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """MODEL_FIELDS of a config, as JSON holds them."""
    fields = {name: getattr(config, name, None) for name in MODEL_FIELDS}
    result: dict[str, Any] = json.loads(json.dumps(fields, default=str))
    return result


def _dtype(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")
