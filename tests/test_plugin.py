"""A codec from outside: one file of somebody else's package, installed, is a name like any other."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "signs"
version = "1.0"

[project.entry-points."kvcompress.codecs"]
signs = "signs"
"""

CODEC = '''
"""`signs1`: the sign of every rotated coordinate, and a gain."""
from dataclasses import dataclass

from kvcompress import packing
from kvcompress.codecs import Band, Codec, register
from kvcompress.codecs.scale import HALF, best_gain
from kvcompress.codecs.transforms import Hadamard


@dataclass(frozen=True)
class Signs:
    def encode(self, y):
        codes = y > 0
        return {"codes": packing.pack(codes, 1), "gain": HALF.encode(best_gain(y, 2.0 * codes - 1))}

    def decode(self, coded, width):
        signs = 2.0 * packing.unpack(coded["codes"], 1, coded["gain"].shape[-1], width) - 1
        return signs * HALF.decode(coded["gain"]).unsqueeze(-1)

    def vector_bits(self, width, dtype):
        return width + HALF.bits


@register("signs", bits=(1,))
def build(spec, geometry):
    transform = Hadamard(geometry.head_dim)
    return Codec(geometry.head_dim, transform, (Band(transform.rank, Signs()),))
'''

USE = """
import torch
from kvcompress import CompressedCache, CacheSpec, models
from kvcompress.spec import CODECS

assert "signs" in list(CODECS)
model, _ = models.embedded()
model.set_attn_implementation("kvcompress")
cache = CompressedCache(model.config, "key=trellis4,value=signs1")
tokens = torch.arange(400).unsqueeze(0)
with torch.inference_mode():
    for chunk in tokens.split(200, dim=1):
        logits = model(chunk, past_key_values=cache).logits
assert logits.isfinite().all()
report = cache.memory()
print(8 * (report.codes + report.scales) / report.coded_elements)
"""


def test_a_package_brings_a_codec(tmp_path):
    project, installed = tmp_path / "project", tmp_path / "installed"
    project.mkdir()
    (project / "pyproject.toml").write_text(PROJECT)
    (project / "signs.py").write_text(CODEC)
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", installed, project], check=True, capture_output=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(installed), str(ROOT)])}
    command = [sys.executable, "-c", USE]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) == (4 + 16 / 64 + 1 + 16 / 64) / 2  # keys and values with a gain each, heads of 64
