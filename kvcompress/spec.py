"""What to compress a cache to: `CacheSpec`, as a dataclass, as a short string and as JSON.

The string grammar, also that of `--spec` on the command line::

    SPEC    := [CODECS] {"," SETTING}
    CODECS  := NAME[BITS]                     trellis3, lloyd4, exact, fp8
             | NAME ":k" BITS "v" BITS        trellis:k4v2 (4 bits for keys, 2 for values)
    SETTING := "key=" NAME[BITS] | "value=" NAME[BITS] | "sinks=" TOKENS | "window=" TOKENS
             | "layer" INDEX "=" CODECS       layer0=exact, layer-1=trellis:k4v4 (negative: from the end)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kvcompress.registry import Registry

if TYPE_CHECKING:
    from kvcompress.codecs import Codec

#: Codec families by name: a function of (CodecSpec, head_dim) that returns the codec, with an attribute `bits`: the
#: bit counts that it takes, an empty tuple where the family has no such choice. `kvcompress.codecs` fills it.
CODECS: Registry[Callable[[CodecSpec, int], Codec]] = Registry("codec", group="kvcompress.codecs")

#: The codecs of a spec that names none: what measures best at about 3 bits (python -m benchmarks quick).
DEFAULT_SPEC = "trellis:k4v2"

JSON_VERSION = 1


@dataclass(frozen=True)
class CodecSpec:
    """How one side, keys or values, is coded: a registered family and its bits per code (None: it has no choice).

    `CodecSpec.parse("trellis3") == CodecSpec("trellis", 3)`. Raises ValueError for an unknown family or bit count.
    """

    name: str
    bits: int | None = None

    def __post_init__(self) -> None:
        allowed: tuple[int, ...] = CODECS[self.name].bits  # type: ignore[attr-defined]
        if self.bits is None and allowed:
            raise ValueError(f"codec {self.name!r} needs a bit count: {', '.join(f'{self.name}{b}' for b in allowed)}")
        if self.bits is not None and self.bits not in allowed:
            accepted = ", ".join(map(str, allowed)) if allowed else "no bit count"
            raise ValueError(f"codec {self.name!r} takes {accepted}, got {self.bits!r}")

    @classmethod
    def parse(cls, text: str) -> CodecSpec:
        text = text.strip()
        if text in CODECS:  # a name that ends in digits, such as fp8
            return cls(text)
        name, bits = re.fullmatch(r"(.*?)(\d*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
        return cls(name, int(bits)) if bits and name in CODECS else cls(text)

    def build(self, head_dim: int) -> Codec:
        """The codec for vectors of `head_dim`; raises ValueError where the family does not support that size."""
        return CODECS[self.name](self, head_dim)

    def __str__(self) -> str:
        return f"{self.name}{'' if self.bits is None else self.bits}"


@dataclass(frozen=True)
class LayerSpec:
    """The codecs of one layer's keys and values."""

    key: CodecSpec
    value: CodecSpec

    @classmethod
    def parse(cls, text: str) -> LayerSpec:
        split = re.fullmatch(r"\s*(\w+):k(\d+)v(\d+)\s*", text)
        if split:
            name, key, value = split.groups()
            return cls(CodecSpec(name, int(key)), CodecSpec(name, int(value)))
        both = CodecSpec.parse(text)
        return cls(both, both)

    def __str__(self) -> str:
        if self.key == self.value:
            return str(self.key)
        if self.key.name == self.value.name:
            return f"{self.key.name}:k{self.key.bits}v{self.value.bits}"
        return f"key={self.key},value={self.value}"


LayerLike = LayerSpec | CodecSpec | str


def _as_codec(value: CodecSpec | str, what: str) -> CodecSpec:
    if isinstance(value, str):
        return CodecSpec.parse(value)
    if not isinstance(value, CodecSpec):
        raise TypeError(f"{what} must be a CodecSpec or a string such as 'trellis3', got {type(value).__name__}")
    return value


def _as_layer(value: LayerLike) -> LayerSpec:
    if isinstance(value, LayerSpec):
        return value
    return LayerSpec.parse(value) if isinstance(value, str) else LayerSpec(*[_as_codec(value, "a layer's codec")] * 2)


@dataclass(frozen=True)
class CacheSpec:
    """How a whole cache is held: codecs of keys and values, exact parts, exceptions by layer.

    key, value: the codecs (a string is parsed).
    sinks: the first tokens of a row, kept exact for ever (tokens; attention sinks, arXiv 2309.17453).
    window: the most recent tokens, kept exact until they leave it (tokens).
    layers: layer index to its own codecs (LayerSpec, CodecSpec or string); negative indices count from the end.
    """

    key: CodecSpec = field(default_factory=lambda: LayerSpec.parse(DEFAULT_SPEC).key)
    value: CodecSpec = field(default_factory=lambda: LayerSpec.parse(DEFAULT_SPEC).value)
    sinks: int = 4
    window: int = 128
    layers: Mapping[int, LayerLike] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", _as_codec(self.key, "key"))
        object.__setattr__(self, "value", _as_codec(self.value, "value"))
        for name in ("sinks", "window"):
            count = getattr(self, name)
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise ValueError(f"{name} must be a number of tokens, 0 or more, got {count!r}")
        for index in self.layers:
            if not isinstance(index, int) or isinstance(index, bool):
                raise ValueError(f"layers maps layer indices (int) to codecs, got the key {index!r}")
        object.__setattr__(self, "layers", {i: _as_layer(v) for i, v in sorted(self.layers.items())})

    def layer(self, index: int, count: int) -> LayerSpec:
        """The codecs of layer `index` of `count`; raises ValueError when an exception names a layer beyond them."""
        outside = [i for i in self.layers if not -count <= i < count]
        if outside:
            raise ValueError(f"the spec names layer {outside[0]}, but the model has {count} layers")
        exceptions = {i % count: _as_layer(v) for i, v in self.layers.items()}
        return exceptions.get(index, LayerSpec(self.key, self.value))

    @classmethod
    def parse(cls, spec: CacheSpec | str) -> CacheSpec:
        """A spec from its string (a CacheSpec is returned as it is); raises ValueError that says what is accepted."""
        if isinstance(spec, CacheSpec):
            return spec
        if not isinstance(spec, str):
            raise TypeError(f"a spec is a CacheSpec or a string such as 'trellis3', got {type(spec).__name__}")
        result, layers = cls(), {}
        for position, part in enumerate(spec.split(",")):
            name, equals, value = (s.strip() for s in part.partition("="))
            layer = re.fullmatch(r"layer(-?\d+)", name)
            if not equals and position == 0:
                both = LayerSpec.parse(part)
                result = replace(result, key=both.key, value=both.value)
            elif equals and name == "key":
                result = replace(result, key=CodecSpec.parse(value))
            elif equals and name == "value":
                result = replace(result, value=CodecSpec.parse(value))
            elif equals and name == "sinks":
                result = replace(result, sinks=_tokens(name, value))
            elif equals and name == "window":
                result = replace(result, window=_tokens(name, value))
            elif equals and layer:
                layers[int(layer[1])] = LayerSpec.parse(value)
            else:
                raise ValueError(
                    f"cannot read {part.strip()!r} in the spec {spec!r}: expected a codec (trellis3, trellis:k4v2), "
                    "then settings key=CODEC, value=CODEC, sinks=TOKENS, window=TOKENS, layerINDEX=CODEC"
                )
        return replace(result, layers=layers)

    def __str__(self) -> str:
        parts = [str(LayerSpec(self.key, self.value))]
        default = CacheSpec()
        parts += [f"{n}={getattr(self, n)}" for n in ("sinks", "window") if getattr(self, n) != getattr(default, n)]
        for index, layer in self.layers.items():
            text = str(layer)
            if text.startswith("key="):
                raise ValueError(f"layer {index} mixes codec families, which the string form cannot say; use to_json()")
            parts.append(f"layer{index}={text}")
        return ",".join(parts)

    def to_json(self) -> str:
        def codec(spec: CodecSpec) -> dict[str, Any]:
            return {"name": spec.name, "bits": spec.bits}

        layers = {str(i): _as_layer(v) for i, v in self.layers.items()}
        content = {
            "version": JSON_VERSION,
            "key": codec(self.key),
            "value": codec(self.value),
            "sinks": self.sinks,
            "window": self.window,
            "layers": {i: {"key": codec(v.key), "value": codec(v.value)} for i, v in layers.items()},
        }
        return json.dumps(content)

    @classmethod
    def from_json(cls, text: str) -> CacheSpec:
        """The inverse of `to_json`; raises ValueError for another version or unknown fields."""
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("version") != JSON_VERSION:
            version = content.get("version") if isinstance(content, dict) else None
            raise ValueError(f"expected a CacheSpec of JSON version {JSON_VERSION}, got version {version!r}")
        known = {"version", "key", "value", "sinks", "window", "layers"}
        if set(content) - known:
            raise ValueError(f"unknown fields {sorted(set(content) - known)}; known: {sorted(known)}")
        try:
            layers = {
                int(i): LayerSpec(CodecSpec(**v["key"]), CodecSpec(**v["value"]))
                for i, v in content.get("layers", {}).items()
            }
            sides = {side: CodecSpec(**content[side]) for side in ("key", "value")}
            return cls(**sides, sinks=content["sinks"], window=content["window"], layers=layers)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a CacheSpec: {error}") from error


def _tokens(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} must be a number of tokens, got {text!r}") from None
