"""Write a look-up by the last two tokens into the marathon model, which training then sharpens.

A small model that has never looked back needs very many tokens to begin (benchmarks/embedded/plant.py says why), and
this one has a single head in every layer to do it with. Three heads are overwritten: in the first layer and in the
second one that looks at the token before, so that every position holds the last token but one and the last but two in
subspaces of their own; and the global one, which looks for places before which the same two tokens stand that stand
here last, and copies what follows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import SmolLM3ForCausalLM
from transformers.models.smollm3.modeling_smollm3 import SmolLM3DecoderLayer

from benchmarks.embedded.plant import one_before, orthogonal

SHARP = 60.0  # logits between the previous token and its neighbours, about
STRENGTH = 6.0  # of what is carried on, in units of its code
MATCH = 16.0  # logits, about, for each of two tokens that agree
WRITTEN = 0.3  # of what is looked up, in lengths of a hidden state
RIDGE = 1e-6


@torch.no_grad()
def plant_lookup(model: SmolLM3ForCausalLM, layer: int, sample: Tensor, generator: torch.Generator) -> None:
    """Overwrite the heads of layers 1, 2 and `layer`. sample: ids [1, N] of text, on which the look-up is fitted."""
    width = model.config.head_dim
    layers = model.model.layers
    quiet = _quiet(model, range(2, layer + 1), sample)
    once, twice = quiet[:width], quiet[width : 2 * width]
    code, centre = _codes(_inputs(model, 1, sample), width, generator)
    _look_before(model, 1, sample)
    _copy(layers[1], code, once)
    codes = _inputs(model, 1, sample) @ code.mT - centre
    _look_before(model, 2, sample)
    _copy(layers[2], _regression(_inputs(model, 2, sample)[1:], codes[:-1]), twice)

    attention, norm = layers[layer].self_attn, layers[layer].input_layernorm.weight
    rows = _inputs(model, layer, sample)
    last, before = (x / x.norm(dim=1, keepdim=True) for x in codes.split(width // 2, dim=1))
    query = torch.cat([_regression(rows, last), _regression(rows[1:], before[:-1])])
    key = torch.cat([_regression(rows[1:], last[:-1]), _regression(rows[2:], before[:-2])])
    agreeing = (rows[:-1] @ query.mT) * (rows[1:] @ key.mT)  # a position and the next, before which its tokens stand
    for part in (slice(width // 2), slice(width // 2, None)):
        scale = (MATCH * width**0.5 / agreeing[:, part].sum(dim=1).mean()).sqrt()
        query[part] *= scale
        key[part] *= scale
    attention.q_proj.weight.copy_(query / norm)
    attention.k_proj.weight.copy_(key / norm)
    embeddings = model.model.embed_tokens.weight
    names = orthogonal(width, embeddings.shape[1], generator)
    said = (embeddings[sample[0]] - embeddings.mean(dim=0)) @ names.mT
    said = said / said.norm(dim=1).mean()
    attention.v_proj.weight.copy_(_regression(rows, said) / norm)
    attention.o_proj.weight.copy_(names.mT * WRITTEN * _norm(model, layer + 1, sample))


def _codes(rows: Tensor, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(matrix [width, hidden], mean [width]) that take rows to codes of unit variance in mixed strongest directions."""
    mean = rows.mean(dim=0)
    values, vectors = torch.linalg.eigh((rows - mean).mT @ (rows - mean) / len(rows))
    white = vectors[:, -width:] / values[-width:].sqrt()
    code = orthogonal(width, width, generator) @ white.mT
    return code, code @ mean


def _copy(layer: SmolLM3DecoderLayer, read: Tensor, written: Tensor) -> None:
    """Let a head carry what `read` [width, hidden] finds to directions `written` [width, hidden]."""
    layer.self_attn.v_proj.weight.copy_(read / layer.input_layernorm.weight)
    layer.self_attn.o_proj.weight.copy_(written.mT * STRENGTH)


def _norm(model: SmolLM3ForCausalLM, layer: int, sample: Tensor) -> Tensor:
    """The mean length of a layer's inputs."""
    return model.model(sample, output_hidden_states=True, use_cache=False).hidden_states[layer][0].norm(dim=1).mean()


def _quiet(model: SmolLM3ForCausalLM, layers: range, sample: Tensor) -> Tensor:
    """Orthonormal directions [hidden, hidden] of the layers' inputs, those where least happens first."""
    rows = torch.cat([_inputs(model, layer, sample) for layer in layers])
    return torch.linalg.eigh(rows.mT @ rows)[1].mT


def _regression(rows: Tensor, targets: Tensor) -> Tensor:
    """The matrix [width, hidden] that takes rows [N, hidden] nearest to targets [N, width], slightly shrunk."""
    gram = rows.mT @ rows
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    return torch.linalg.solve(gram + ridge, rows.mT @ targets).mT


def _inputs(model: SmolLM3ForCausalLM, layer: int, sample: Tensor) -> Tensor:
    """What a layer's attention gets of the sample, [N, hidden], before its norm's weights."""
    states = model.model(sample, output_hidden_states=True, use_cache=False).hidden_states[layer][0]
    return states / states.square().mean(dim=1, keepdim=True).sqrt()


def _look_before(model: SmolLM3ForCausalLM, layer: int, sample: Tensor) -> None:
    """Let a layer's queries and keys hold a constant each, which RoPE makes agree best for the token before."""
    config: Any = model.config  # its sizes are optional to the type checker, but a built model has them all
    own = model.model.layers[layer]
    rows = _inputs(model, layer, sample)
    read = torch.linalg.lstsq(rows, torch.ones(len(rows), 1)).solution.squeeze(1)  # read . row is about 1
    read = read / own.input_layernorm.weight
    query, key = one_before(config.head_dim, config.rope_parameters["rope_theta"], SHARP)
    own.self_attn.k_proj.weight.copy_(torch.outer(key, read))
    own.self_attn.q_proj.weight.copy_(torch.outer(query, read))
