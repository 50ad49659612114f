"""How many bits which quarter of a spectrum is worth: ``python -m benchmarks.profiles TEXT``.

For every average the profiles of whole bits that never rise are ranked by reverse water-filling: the distortion that
rate-distortion theory predicts, sum over dimensions of variance x D(bits), on spectra of balanced components measured
on the embedded model, and on the heads of big models where their file is given. The best few are then run, on keys and
on values by themselves, and their KL decides what stands in `kvcompress/codecs/spectral.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import quality, spectra, subjects, texts
from benchmarks.caches import UNCOMPRESSED, compressed
from kvcompress.codecs import balanced, spectral

#: Mean squared error of a unit Gaussian under 0 to 6 bits: trellis codes, from 5 bits on Lloyd-Max (README.md).
DISTORTION = (1.0, 0.31, 0.0806, 0.0217, 0.0060, 0.0025, 0.00067)

Profile = tuple[int, int, int, int]


def candidates(average: float) -> list[Profile]:
    """The profiles of that average whose bits never rise and differ by 4 at most."""
    choices = itertools.product(range(len(DISTORTION)), repeat=4)
    falling = (p for p in choices if sum(p) == 4 * average and list(p) == sorted(p, reverse=True) and p[0] - p[3] <= 4)
    return [(p[0], p[1], p[2], p[3]) for p in falling]


def predicted(variances: Tensor, profile: Profile) -> float:
    """Distortion over variance of components with `variances` [heads, D], averaged over heads."""
    shares = (variances / variances.sum(dim=-1, keepdim=True)).unflatten(-1, (4, -1)).sum(dim=-1)
    return (shares @ torch.tensor([DISTORTION[bits] for bits in profile], dtype=shares.dtype)).mean().item()


@contextmanager
def recorded() -> Iterator[list[Tensor]]:
    """Within it the variances [heads, D] of every balanced basis that is fitted are noted."""
    found: list[Tensor] = []
    own = balanced.components

    def components(covariance: Tensor) -> tuple[Tensor, Tensor]:
        variances, vectors = own(covariance)
        found.append(variances.flatten(0, -2))
        return variances, vectors

    balanced.components = components
    try:
        yield found
    finally:
        balanced.components = own


@contextmanager
def profile_of(average: float, profile: Profile) -> Iterator[None]:
    """Within it spectral codecs of this average have that profile."""
    own = spectral.PROFILES[average]
    spectral.PROFILES[average] = profile
    try:
        yield
    finally:
        spectral.PROFILES[average] = own


def divergence(model: PreTrainedModel, passages: list[Tensor], spec: str, reference: list[Tensor]) -> float:
    """Mean KL in nats per token of all passages through a cache."""
    contender, context = compressed(spec), passages[0].shape[1]
    positions = quality.scored_positions(context, model.config.vocab_size)
    found = [quality.predict(model, contender, ids, positions, 512, lambda _: None).log_probs for ids in passages]
    targets = [ids[0, positions + 1] for ids in passages]
    return quality.compare(reference, found, targets).kl_mean


def main(
    text: Annotated[Path, typer.Argument(help="a book that is not used for evaluation")],
    big: Annotated[Path | None, typer.Option(help="kv_spectra.json: spectra of big models")] = None,
    context: Annotated[int, typer.Option(help="tokens of a passage")] = 3072,
    count: Annotated[int, typer.Option(help="passages")] = 2,
    keep: Annotated[int, typer.Option(help="profiles of each average that are run")] = 3,
) -> None:
    """Rank the profiles, run the best, print both."""
    model, tokenizer = subjects.load(None)
    passages = texts.load(tokenizer, text, seed=0).windows(count, context)
    positions = quality.scored_positions(context, model.config.vocab_size)
    reference = [
        quality.predict(model, UNCOMPRESSED, ids, positions, 512, lambda _: None).log_probs for ids in passages
    ]
    with recorded() as found:
        divergence(model, passages[:1], "prerope+spectral3", reference[:1])
    own = torch.cat(found)
    heads = [] if big is None else [side for pair in spectra.spectra(big)[1] for side in pair]
    others = torch.stack([spectra.extended(top, 128) for top in heads]).double() if heads else None
    table = Table("average", "profile", "predicted, embedded", "predicted, big models", "KL of keys", "KL of values")
    for average in spectral.PROFILES:
        ranked = sorted(candidates(average), key=lambda profile: predicted(own, profile))[:keep]
        for profile in sorted({*ranked, spectral.PROFILES[average]}, key=lambda profile: predicted(own, profile)):
            with profile_of(average, profile):
                kl = [
                    divergence(model, passages, f"exact,{side}=prerope+spectral{average}", reference)
                    for side in ("key", "value")
                ]
            chosen = " (in use)" if profile == spectral.PROFILES[average] else ""
            big_share = "-" if others is None else f"{predicted(others, profile):.4f}"
            name = f"{profile}{chosen}"
            table.add_row(str(average), name, f"{predicted(own, profile):.4f}", big_share, *(f"{x:.2e}" for x in kl))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
