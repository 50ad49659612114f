"""What coding every token by itself costs, as servers need it: ``python -m benchmarks.token_records``.

The embedded model reads held-out text in chunks of 64 tokens. A chunk's own tokens are exact; all before it went
through records of single tokens (kvcompress/records.py). With a mean, as `kvcompress calibrate --basis` would learn it,
and without one; with the first tokens exact, and without. KL in nats a token to the uncompressed predictions, from the
second chunk on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from benchmarks import texts
from benchmarks.options import telling_errors
from kvcompress import models
from kvcompress.codecs import Geometry
from kvcompress.records import TokenCodec
from kvcompress.spec import CacheSpec

CHUNK = 64  # tokens
SPECS = "trellis2 trellis3 trellis:k3v4 trellis:k4v3 trellis4 lloyd3 lloyd4 lloyd5 turboquant3 turboquant4 fp8"

Sides = tuple[TokenCodec, TokenCodec]


class CodedCache(DynamicCache):
    """Holds every token as its records stand for it, but the first `sinks`; hands out a chunk's own tokens exactly.

    codecs: of each layer; none: nothing is coded.
    """

    def __init__(self, config: Any, codecs: list[Sides], sinks: int = 0):
        super().__init__(config=config)
        self.codecs, self.sinks = codecs, sinks

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layer: Any = self.layers[layer_idx]
        given = key_states, value_states
        before = (layer.keys, layer.values) if layer.is_initialized else tuple(x[:, :, :0] for x in given)
        exact = max(self.sinks - before[0].shape[2], 0)
        coded = given if not self.codecs else tuple(map(_through, given, self.codecs[layer_idx]))
        kept = [torch.cat([x[:, :, :exact], y[:, :, exact:]], dim=2) for x, y in zip(given, coded, strict=True)]
        super().update(kept[0], kept[1], layer_idx)
        key, value = (torch.cat(pair, dim=2) for pair in zip(before, given, strict=True))
        return key, value


def _through(x: Tensor, codec: TokenCodec) -> Tensor:
    """Vectors [1, H, T, D] as their records stand for them."""
    return codec.decode(codec.encode(x[0].transpose(0, 1))).transpose(0, 1).unsqueeze(0)


@dataclass(frozen=True)
class Subject:
    """The model and what it reads, windows int64 [1, tokens]; means [1, H, D] of each layer's keys and values."""

    model: LlamaForCausalLM
    windows: list[Tensor]
    means: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, path: Path | None, count: int, length: int, seed: int) -> Subject:
        """Means are of another part of the text than the windows."""
        model, tokenizer = models.embedded()
        text = texts.load(tokenizer, path, seed)
        cache = DynamicCache(config=model.config)
        model(text.windows(count, length, first=0.0)[-1], past_key_values=cache)
        layers: list[Any] = cache.layers
        means = [(layer.keys.float().mean(dim=2), layer.values.float().mean(dim=2)) for layer in layers]
        return cls(model, text.windows(count, length, first=0.9)[: count - 1], means)

    def logs(self, codecs: list[Sides], sinks: int = 0) -> Tensor:
        """Log-probabilities of what follows, [windows, tokens, vocabulary], without the first chunk's."""
        found = []
        for window in self.windows:
            cache = CodedCache(self.model.config, codecs, sinks)
            chunks = [self.model(chunk, past_key_values=cache).logits for chunk in window.split(CHUNK, dim=1)]
            found.append(torch.cat(chunks[1:], dim=1)[0].log_softmax(dim=-1))
        return torch.stack(found)

    def codecs(self, spec: CacheSpec, mean: bool) -> list[Sides]:
        """Of every layer; raises ValueError for codecs that do not code tokens one by one."""
        heads, width = self.means[0][0].shape[1:]
        return [
            (
                TokenCodec.of(spec.key, Geometry(width, 0, heads), fit={"mean": own[0]} if mean else None),
                TokenCodec.of(spec.value, Geometry(width, 1, heads), fit={"mean": own[1]} if mean else None),
            )
            for own in self.means
        ]


@torch.no_grad()
def run(specs: list[str], text: Path | None, count: int, length: int, seed: int) -> None:
    subject = Subject.of(text, count, length, seed)
    wanted = subject.logs([])
    print("| spec | bits/elem | mean | exact sinks | KL | top-1 |\n| --- | ---: | --- | ---: | ---: | ---: |")
    for name in specs:
        spec = CacheSpec.parse(name)
        learns = spec.key.name in ("trellis", "lloyd")
        for mean, sinks in [(False, 0), (False, 4), *([(True, 0)] if learns else [])]:
            codecs = subject.codecs(spec, mean)
            found = subject.logs(codecs, sinks)
            kl = (wanted.exp() * (wanted - found)).sum(dim=-1).mean()
            top = (wanted.argmax(dim=-1) == found.argmax(dim=-1)).float().mean()
            bits = 8 * sum(codec.size for codec in codecs[0]) / (2 * codecs[0][0].codec.head_dim)
            print(f"| {name} | {bits:.2f} | {'yes' if mean else 'no'} | {sinks} | {kl:.2e} | {top:.1%} |", flush=True)


def main(
    specs: Annotated[str, typer.Option(help="specs, with spaces between")] = SPECS,
    text: Annotated[Path | None, typer.Option(help="text file  [default: library modules training never saw]")] = None,
    windows: Annotated[int, typer.Option(help="windows of the text, one of which teaches the means")] = 5,
    length: Annotated[int, typer.Option(help="tokens of a window")] = 1024,
    seed: Annotated[int, typer.Option(help="of the order of the modules")] = 0,
) -> None:
    """KL of caches whose tokens are coded one by one."""
    with telling_errors():
        run(specs.split(), text, windows, length, seed)


if __name__ == "__main__":
    typer.run(main)
