"""Tensors shaped like the caches of big models, and what a cache does to attention over them: no model is run.

From the 32 largest eigenvalues of a head's second moment (a JSON file that lists them for keys and values of single
heads of Llama-3.1-8B and Qwen2.5-7B; D = 128) this makes, for every head in it, independent tokens

    k_t = mean + s_t * U sqrt(lambda) z_t            z_t standard normal, s_t the scale of Student's t, E[s_t^2] = 1

* `lambda`: the given eigenvalues, then a power law in the rank, fitted to the ranks 9 to 32 and joined at the 32nd.
* `mean`: takes MEAN_SHARE of the first eigenvalue (keys: nearly all of it), along the first column of U; the rest of
  that eigenvalue stays variance.
* `U`: orthogonal; its first column is a vector of heavy-tailed entries (t with 2 degrees of freedom: a few channels
  carry the mean), the others lean on a channel of their own, in random order, with about half of their energy, and
  spread the rest over all channels: channels differ in size, but no rotation is free.
* `s_t`: one for a token and side, with FREEDOM degrees of freedom, so that some tokens are several times as long.
* sinks: the first SINKS tokens point in random directions; their keys' norms are 0.3 to 3 times the root mean square of
  the others (log-uniform), their values' a twentieth of it.
* queries, QUERY_HEADS for each KV head: covariance with eigenvalues 1/rank in a basis of the same kind but their own,
  scaled so that scores against centred keys have a standard deviation of 0.5 to 2 (log-uniform, one a query head), plus
  a constant component along the first sink's key that gives this sink about a third of the attention on average.

There is no rotary embedding: a codec that works before it is handed a rotation by nothing. Reported is the squared
error of attention's output over its squared size, per query head, averaged over heads; causal, from `first_scored` on.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, LlamaConfig

from benchmarks.caches import UNCOMPRESSED, Contender
from benchmarks.passages import first_scored
from benchmarks.rows import Row
from benchmarks.storage import footprint
from kvcompress.attention import attention_forward

#: Of the first eigenvalue, the share that is the mean's: keys, values.
MEAN_SHARE = (0.95, 0.5)
FREEDOM, SINKS, QUERY_HEADS = 5, 4, 2
FITTED_FROM = 9  # rank from which the power law of the eigenvalues is fitted


@dataclass(frozen=True)
class Tensors:
    """key, value [1, H, N, D]; query [1, H * QUERY_HEADS, N, D]; float32."""

    key: Tensor
    value: Tensor
    query: Tensor


def spectra(path: Path) -> tuple[int, list[tuple[Tensor, Tensor]]]:
    """The head dimension, and for every head in the file its largest eigenvalues (keys, values), descending, [32]."""
    models = json.loads(path.read_text("utf-8")).values()
    heads: list[tuple[Tensor, Tensor]] = []
    for model in models:
        listed = model["uncentred_top32_eigenvalues"]
        names = sorted(name.removesuffix("_keys") for name in listed if name.endswith("_keys"))
        heads += [(torch.tensor(listed[f"{name}_keys"]), torch.tensor(listed[f"{name}_values"])) for name in names]
    (width,) = {model["head_dim"] for model in models}
    return width, heads


def extended(top: Tensor, width: int) -> Tensor:
    """All `width` eigenvalues, the given ones [n] first: the rest follow a power law of the ranks from FITTED_FROM."""
    ranks = torch.arange(1, width + 1, dtype=torch.float64)
    x, y = ranks[FITTED_FROM - 1 : len(top)].log(), top[FITTED_FROM - 1 :].double().log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    tail = top[-1] * (ranks[len(top) :] / len(top)) ** slope.clamp(max=0)
    return torch.cat([top.double(), tail]).float()


def leaning_basis(width: int, generator: torch.Generator) -> Tensor:
    """U of the module's text: orthogonal [width, width], columns are directions."""
    own = torch.eye(width)[:, torch.randperm(width, generator=generator)]
    spread = torch.randn(width, width, generator=generator) / math.sqrt(width)
    columns = own + spread
    columns[:, 0] = torch.randn(width, generator=generator) * student_scales((width,), 2, generator)
    return torch.linalg.qr(columns)[0]


def student_scales(shape: tuple[int, ...], freedom: int, generator: torch.Generator) -> Tensor:
    """s with s * (standard normal) of Student's t distribution."""
    chi = torch.randn(*shape, freedom, generator=generator).square().sum(dim=-1)
    return (freedom / chi).sqrt()


def side(top: Tensor, width: int, tokens: int, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens [tokens, width] of keys or values, sinks among them, and their mean [width]."""
    eigenvalues, basis = extended(top, width), leaning_basis(width, generator)
    mean = basis[:, 0] * (share * eigenvalues[0]).sqrt()
    variances = torch.cat([eigenvalues[:1] * (1 - share), eigenvalues[1:]])
    scales = student_scales((tokens, 1), FREEDOM, generator) * math.sqrt((FREEDOM - 2) / FREEDOM)
    return mean + scales * torch.randn(tokens, width, generator=generator) @ (basis * variances.sqrt()).mT, mean


def put_sinks(key: Tensor, value: Tensor, generator: torch.Generator) -> None:
    """Overwrite the first tokens of [tokens, width] by sinks."""
    for x, norms in ((key, 0.3 * 10 ** torch.rand(SINKS, 1, generator=generator)), (value, torch.tensor(0.05))):
        directions = torch.randn(SINKS, x.shape[1], generator=generator)
        size = x[SINKS:].square().sum(dim=1).mean().sqrt()
        x[:SINKS] = directions / directions.norm(dim=1, keepdim=True) * norms * size


def queries(key: Tensor, mean: Tensor, generator: torch.Generator) -> Tensor:
    """Queries [QUERY_HEADS, tokens, width] of one KV head's keys [tokens, width]."""
    tokens, width = key.shape
    result = []
    for _ in range(QUERY_HEADS):
        root = leaning_basis(width, generator) / torch.arange(1, width + 1).sqrt()
        free = torch.randn(tokens, width, generator=generator) @ root.mT
        spread = (free[:256] @ (key[SINKS:] - mean).mT).std() / math.sqrt(width)
        wanted = 0.5 * math.exp(torch.rand(1, generator=generator).item() * math.log(4.0))
        pull = math.log(tokens / 2) + wanted**2 / 2  # the score at which a sink weighs half as much as all the rest
        toward = key[0] / key[0].square().sum() * math.sqrt(width) * pull
        result.append(free * (wanted / spread) + toward)
    return torch.stack(result)


def synthesise(path: Path, tokens: int, seed: int) -> Tensors:
    """The tensors of the module's text, all drawn by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    width, heads = spectra(path)
    parts = []
    for top_key, top_value in heads:
        key, mean = side(top_key, width, tokens, MEAN_SHARE[0], generator)
        value, _ = side(top_value, width, tokens, MEAN_SHARE[1], generator)
        put_sinks(key, value, generator)
        parts.append((key, value, queries(key, mean, generator)))
    key, value, query = (torch.stack(each).unsqueeze(0) for each in zip(*parts, strict=True))
    return Tensors(key, value, query.flatten(1, 2))


class TensorCase:
    """Attention over such tensors, `chunk` tokens at a time, against the same over an uncompressed cache."""

    def __init__(self, tensors: Tensors, chunk: int):
        self.tensors, self.chunk = tensors, chunk
        self.first = first_scored(tensors.key.shape[2])
        self.cache, self.exact = self._attend(UNCOMPRESSED)

    def probe(self, contender: Contender) -> None:
        """See `benchmarks.cases.Case`."""
        config = self._config(contender)
        self._step(config, contender.make(config), slice(0, 1))

    def measure(self, contender: Contender, row: Row) -> Row:
        """See `benchmarks.cases.Case`."""
        cache, out = self._attend(contender)
        size = footprint(cache, self.cache)
        error = (out - self.exact).square().sum(dim=(0, 1, 3)) / self.exact.square().sum(dim=(0, 1, 3))
        return replace(
            row,
            **size.fields(),
            output_error=error.mean().item(),
            scored_positions=out.shape[1],
        )

    def _attend(self, contender: Contender) -> tuple[Cache, Tensor]:
        """The filled cache and the outputs [1, n, heads, D] of the scored tokens."""
        config = self._config(contender)
        cache = contender.make(config)
        length = self.tensors.key.shape[2]
        parts = [
            self._step(config, cache, slice(start, min(start + self.chunk, length)))
            for start in range(0, length, self.chunk)
        ]
        return cache, torch.cat(parts, dim=1)[:, self.first :]

    @torch.inference_mode()
    def _step(self, config: LlamaConfig, cache: Cache, part: slice) -> Tensor:
        """The output [1, n, heads, D] of one chunk, which the cache takes in."""
        module: Any = SimpleNamespace(config=config, layer_idx=0, is_causal=True)
        key, value = cache.update(self.tensors.key[:, :, part], self.tensors.value[:, :, part], 0)
        return attention_forward(module, self.tensors.query[:, :, part], key, value, None)[0]

    def _config(self, contender: Contender) -> LlamaConfig:
        """One layer of these sizes; rotary positions stand still, by a factor that no length makes up for."""
        _, heads, tokens, width = self.tensors.key.shape
        config = LlamaConfig(
            hidden_size=self.tensors.query.shape[1] * width,
            num_hidden_layers=1,
            num_attention_heads=self.tensors.query.shape[1],
            num_key_value_heads=heads,
            head_dim=width,
            max_position_embeddings=tokens,
            rope_parameters={"rope_type": "linear", "factor": 1e12, "rope_theta": 10_000.0},
        )
        config._attn_implementation = contender.attention or "sdpa"
        return config
