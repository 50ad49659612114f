"""`CODEC/CODEC/...`: each KV head its own codec, in the heads' order, for budgets by head (`trellis4/trellis3`).

Heads of the same codec are coded together, as a group; what a group stores and learns has its number as a prefix
("0.0.codes", "1.mean"). Each group is fitted to its codec's own number of tokens, so every head's codes are those that
its codec would make alone. What codes stand for is filled up with zeros to the largest rank of them all.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvcompress.codecs import Codec, Coded, Fit, Geometry, register, within
from kvcompress.spec import PER_HEAD, CodecSpec


@dataclass(frozen=True)
class Group:
    """Heads, by index, and the codec of them all."""

    heads: tuple[int, ...]
    codec: Codec


@dataclass(frozen=True)
class Heads(Codec):
    """Codecs by group of heads; `transform` and `bands` are the first group's and stand for nothing."""

    groups: tuple[Group, ...] = field(kw_only=True)

    def __post_init__(self) -> None:
        """The groups' codecs have been checked."""

    @property
    def rank(self) -> int:
        return max(group.codec.rank for group in self.groups)

    @property
    def count(self) -> int:
        """Heads of all groups."""
        return sum(len(group.heads) for group in self.groups)

    def fit(self, x: Tensor, metric: Tensor | None = None) -> Fit:
        fit: Fit = {}
        for index, group in enumerate(self.groups):
            own = None if metric is None else metric[:, group.heads]
            first = self._first(x[:, group.heads], group.codec.fit_tokens)
            fit |= {f"{index}.{name}": learned for name, learned in group.codec.fit(first, own).items()}
        return fit

    def _first(self, x: Tensor, tokens: int) -> Tensor:
        """The first of every `fit_tokens` tokens: those of one row, or of several side by side that share the fit."""
        rows = x.split(max(self.fit_tokens, 1), dim=2)
        return torch.cat([row[:, :, :tokens] for row in rows], dim=2)

    def encode(self, x: Tensor, fit: Fit) -> Coded:
        coded: Coded = {}
        for index, group in enumerate(self.groups):
            own = group.codec.encode(x[:, group.heads], within(fit, f"{index}."))
            coded |= {f"{index}.{name}": part for name, part in own.items()}
        return coded

    def decode(self, coded: Coded, fit: Fit) -> Tensor:
        own = [
            group.codec.decode(within(coded, f"{index}."), within(fit, f"{index}."))
            for index, group in enumerate(self.groups)
        ]
        return self._gather(own, self.rank)

    def absorb(self, query: Tensor, fit: Fit) -> tuple[Tensor, Tensor | None]:
        own = [
            group.codec.absorb(query[:, group.heads], within(fit, f"{index}."))
            for index, group in enumerate(self.groups)
        ]
        absorbed = self._gather([query for query, _ in own], self.rank)
        if all(bias is None for _, bias in own):
            return absorbed, None
        return absorbed, self._gather([query[..., :1] * 0 if bias is None else bias for query, bias in own], 1)

    def restore(self, y: Tensor, fit: Fit) -> Tensor:
        own = [
            group.codec.restore(y[:, group.heads, :, : group.codec.rank], within(fit, f"{index}."))
            for index, group in enumerate(self.groups)
        ]
        return self._gather(own, self.head_dim)

    def _gather(self, parts: list[Tensor], width: int) -> Tensor:
        """The groups' vectors [n, heads of the group or 1, tokens, ...] as [n, H, tokens, width], zeros after them."""
        rows, _, tokens, _ = parts[0].shape
        result = parts[0].new_zeros(rows, self.count, tokens, width)
        for group, part in zip(self.groups, parts, strict=True):
            result[:, group.heads, :, : part.shape[-1]] = part
        return result

    def bits_per_element(self, dtype: torch.dtype) -> float:
        return sum(len(group.heads) * group.codec.bits_per_element(dtype) for group in self.groups) / self.count


@register(PER_HEAD, parts=range(2, 257), examples=("trellis4/trellis3",))
def build(spec: CodecSpec, geometry: Geometry) -> Codec:
    if len(spec.parts) != geometry.heads:
        raise ValueError(f"{spec} names codecs for {len(spec.parts)} KV heads, the layer has {geometry.heads}")
    heads = {part: [h for h, own in enumerate(spec.parts) if own == part] for part in spec.parts}
    groups = tuple(Group(tuple(own), part.build(replace(geometry, heads=len(own)))) for part, own in heads.items())
    codecs = [group.codec for group in groups]
    frames = {str(part): group.codec.frame for part, group in zip(heads, groups, strict=True)}
    if len(set(frames.values())) > 1:
        said = ", ".join(f"{part} in {frame!r}" for part, frame in frames.items())
        raise ValueError(f"the heads of a layer must be coded in the same frame of RoPE, got {said}")
    return Heads(
        geometry.head_dim,
        codecs[0].transform,
        codecs[0].bands,
        centred=all(codec.centred for codec in codecs),
        fit_tokens=max(codec.fit_tokens for codec in codecs),
        weighted=any(codec.weighted for codec in codecs),
        frame=codecs[0].frame,
        page_wise=any(codec.page_wise for codec in codecs),
        groups=groups,
    )
