"""One context over several ranks (kvcompress/parallel.py), and models whose layers lie on several devices.

The ranks' own checks are in tests/parallel_ranks.py: four processes make them once, here they are asked for one by one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from kvcompress import CompressedCache, wrap
from kvcompress.history import History
from tests.families import build, prompt
from tests.parallel_ranks import CHECKS, WORLD

needs_ranks = pytest.mark.skipif(not dist.is_available() or not hasattr(os, "fork"), reason="needs gloo and fork")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank says of its checks."""
    pytest.importorskip("triton", reason="one of the checks needs the kernels")
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.parallel_ranks", str(folder)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("KVCOMPRESS_BACKEND", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@needs_ranks
@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_ranks(results: list[dict[str, Any]], name: str) -> None:
    errors = [own[name]["error"] for own in results if "error" in own.get(name, {})]
    assert not errors, errors[0]
    assert all(name in own for own in results), "an earlier check broke"


@needs_ranks
@pytest.mark.slow
def test_torchrun() -> None:
    """Two processes end with the same sampled text, and hold half of the pages each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "benchmarks.parallel_example", "--tokens", "900", "--new", "6", "--spec", "trellis3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    said = sorted(re.findall(r"rank (\d): ([\d,]+) bytes of pages, [\d,]+ in all; (.*)", done.stdout))
    assert [rank for rank, _, _ in said] == ["0", "1"]
    assert said[0][2] == said[1][2]
    pages = (900 - 4 - 128) // 64  # of every layer; the embedded model has two KV heads of 64 in each of five
    vector = 64 * 3 // 8 + 2  # bytes: codes and a gain of 16 bits
    assert [int(size.replace(",", "")) for _, size, _ in said] == [5 * pages // 2 * 64 * 2 * 2 * vector] * 2


def test_layers_on_disk(tmp_path: Path) -> None:
    """accelerate's device_map: where weights lie changes no bit, not even of what makes the metric of values."""
    pytest.importorskip("accelerate", reason="device_map needs it")
    whole, spec = build("llama", head_dim=64), "spectral3,window=32"
    whole.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head"), "cpu")
    places["model.layers.1"] = "disk"
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk", dtype=torch.float32
    )
    assert spread.model.layers[1].self_attn.o_proj.weight.is_meta
    ids, found = prompt(1, 4 + 512 + 128), []
    for model in (whole, spread.eval()):
        out = wrap(model, spec).generate(ids, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
        assert min(layer.history.coded[0] for layer in out.past_key_values.layers) > 0
        found.append(torch.stack(out.logits))
    assert torch.equal(*found)


def test_a_loaded_cache_follows_its_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lies on one device; a layer that computes on another takes its part there, once."""
    model, moved = build("llama"), []
    cache = CompressedCache(model.config, "trellis3,window=32")
    model(prompt(1, 200), past_key_values=cache)
    cache.save(tmp_path / "cache")
    loaded = CompressedCache.load(tmp_path / "cache", model.config)
    loaded.layers[1].device = torch.device("meta")  # the one other device that every machine has
    monkeypatch.setattr(History, "to", lambda self, device: moved.append(device))
    for _ in range(2):
        model(prompt(1, 1), past_key_values=loaded)
    assert moved == [torch.device("cpu")]
    assert loaded.layers[1].device == torch.device("cpu")
