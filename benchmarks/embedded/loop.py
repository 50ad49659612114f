"""The training loop of the small models that ship with the benchmarks: phases, Muon and AdamW, resumable."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.embedded.corpus import Shares

SAVE_EVERY = 50
DECAY = 0.35
MUON_RATE = 0.02
ADAM_RATE = 3e-3
WARMUP_STEPS = 40


@dataclass(frozen=True)
class Phase:
    """`steps` optimiser steps on `rows` sequences of `context` tokens, drawn by `shares`.

    plant: write a previous-token head into the first layer before the first of them.
    """

    steps: int
    rows: int
    context: int
    shares: Shares
    plant: bool = False


def orthogonalise(matrix: Tensor) -> Tensor:
    """Five Newton-Schulz steps towards the nearest orthogonal matrix (arXiv 2502.16982), in the matrix's own dtype.

    torch.optim.Muon does this in bfloat16, which a CPU without bf16 arithmetic runs far slower.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every matrix moves by the same root-mean-square, whatever its gradient's spectrum."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(buffer, group["momentum"]))
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def rate(step: int, total: int) -> float:
    """The share of the peak learning rate: a short warm-up, a plateau, a linear decay to zero."""
    return min((step + 1) / WARMUP_STEPS, 1.0, (total - step) / (DECAY * total))


def loss_of(model: nn.Module, ids: Tensor, weights: Tensor) -> Tensor:
    logits = model(ids[:, :-1], use_cache=False).logits
    losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    wanted = weights[:, 1:].flatten()
    return (losses * wanted).sum() / wanted.sum()


def optimise(
    model: PreTrainedModel,
    phases: Sequence[Phase],
    draw: Callable[[int, Phase], tuple[np.ndarray, np.ndarray]],
    checkpoint: Path,
    peak: float = 1.0,
    plant: Callable[[], None] | None = None,
) -> None:
    """Train `model` in place through all phases; a run that was killed goes on from `checkpoint`.

    draw: ids and loss weights [rows, context + 1] of a step of a phase. peak: what MUON_RATE and ADAM_RATE are
    multiplied by. plant: what happens to the model before the first step of a phase that says `plant`.
    """
    device = model.device
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = Muon(matrices, lr=MUON_RATE)
    adam = torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    total, done = sum(p.steps for p in phases), 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(saved["model"])
        muon.load_state_dict(saved["muon"])
        adam.load_state_dict(saved["adam"])
        done = saved["step"]
    start, begun = done, time.monotonic()
    for step, (phase, within) in enumerate((p, i) for p in phases for i in range(p.steps)):
        if step < start:
            continue
        if phase.plant and within == 0 and plant is not None:
            plant()
        ids, weights = (torch.from_numpy(a).to(device) for a in draw(step, phase))
        loss = loss_of(model, ids, weights)
        loss.backward()
        nn.utils.clip_grad_norm_(others, 1.0)
        for optimiser, highest in ((muon, MUON_RATE), (adam, ADAM_RATE)):
            for group in optimiser.param_groups:
                group["lr"] = peak * highest * rate(step, total)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        done = step + 1
        if done % 10 == 0 or done == total:
            minutes = (time.monotonic() - begun) / 60
            print(f"step {done}/{total} context {phase.context} loss {loss.item():.4f} {minutes:.1f} min", flush=True)
        if done % SAVE_EVERY == 0 or done == total:
            state = {"model": model.state_dict(), "muon": muon.state_dict(), "adam": adam.state_dict(), "step": done}
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
