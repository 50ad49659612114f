"""What pages may hold: numbers that a codec would read beyond a vector with are refused when a file is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kvcompress import CacheSpec, CompressedCache, persist
from tests.families import build, prompt


@pytest.mark.parametrize("side", ["key", "value"])
def test_places_beyond_a_vector_are_refused(side: str, tmp_path: Path) -> None:
    """Of an outlier: a CPU would raise in the middle of a pass, a GPU would fail for the whole process."""
    own, path = build("llama"), tmp_path / "cache"
    cache = CompressedCache(own.config, CacheSpec("kvquant3", "kvquant3", sinks=4, window=32))
    with torch.no_grad():
        own(prompt(1, 4 + 256 + 64), past_key_values=cache)
    cache.save(path)
    CompressedCache.load(path, own.config)
    with safe_open(str(path), framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118
    (places,) = (x for x in cache.layers[0].history.pool.layout.fields if x.name == f"{side}.places")
    tensors["0.pages"].view(torch.uint8)[-1, places.offset + places.size - 1] = 8  # head_dim is 8
    metadata["sha256"] = persist.checksum(tensors, metadata)
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=rf"name dimension 8 of vectors of 8: {side}\.places"):
        CompressedCache.load(path, own.config)
