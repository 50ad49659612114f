"""What to compress a cache to: `CacheSpec`, as a dataclass, as a short string and as JSON.

The string grammar, also that of `--spec` on the command line::

    SPEC    := [CODECS | PRESET | FILE.json] {"," SETTING}
    CODECS  := CODEC                          trellis3, spectral2.5, exact, fp8
             | CODEC ":k" NUMBER "v" NUMBER   trellis:k4v2 (4 bits for keys, 2 for values)
    CODEC   := NAME[NUMBER]["+" CODEC]        lowrank32+trellis4, prerope+lowrank16+trellis4
             | CODEC {"/" CODEC}              one for each KV head: trellis4/trellis3
    SETTING := "key=" CODEC | "value=" CODEC | "sinks=" TOKENS | "window=" TOKENS
             | "basis=" ("prompt" | "shared" | FILE.safetensors)
             | "layer" INDEX "=" CODECS       layer0=exact, layer-1=trellis:k4v4 (negative: from the end)
             | "layer" INDEX ".key=" CODEC | "layer" INDEX ".value=" CODEC

FILE.json is what `to_json` and `kvcompress calibrate` write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompress.registry import Family, Registry

if TYPE_CHECKING:
    from kvcompress.codecs import Codec, Geometry

#: Codec families by name; `kvcompress.codecs` fills it.
CODECS: Registry[Family] = Registry("codec", group="kvcompress.codecs")

#: The codecs of a spec that names none: what measures best at about 3 bits (python -m benchmarks quality).
DEFAULT_SPEC = "prerope+spectral3"

JSON_VERSION = 1
PER_HEAD = "heads"


@dataclass(frozen=True)
class CodecSpec:
    """How one side, keys or values, is coded: a registered family, its number, and the codecs that it works on.

    bits: the family's number, bits per code for most, the rank for `lowrank`; None where it has none. parts: the codec
    that codes what this one leaves (`lowrank32+trellis4`), or one for each KV head (`trellis4/trellis3`).
    `CodecSpec.parse("trellis3") == CodecSpec("trellis", 3)`. Raises ValueError for what the family does not take.
    """

    name: str
    bits: int | float | None = None
    parts: tuple[CodecSpec, ...] = ()

    def __post_init__(self) -> None:
        CODECS[self.name].check(self.name, self.bits, len(self.parts))
        if isinstance(self.bits, float) and self.bits.is_integer():
            object.__setattr__(self, "bits", int(self.bits))  # one string for one codec
        if any(part.name == PER_HEAD for part in self.parts):
            raise ValueError(f"codecs for each head cannot be a part of {self.name!r}: write A+B/A+C, not A+(B/C)")

    @classmethod
    def parse(cls, text: str) -> CodecSpec:
        """A codec from its string; raises ValueError naming the nearest family where there is none of that name."""
        text = text.strip()
        heads = text.split("/")
        if len(heads) > 1:
            return cls(PER_HEAD, None, tuple(cls.parse(head) for head in heads))
        own, plus, rest = (part.strip() for part in text.partition("+"))
        parts = (cls.parse(rest),) if plus else ()
        if own in CODECS:  # a name that ends in digits, such as fp8
            return cls(own, None, parts)
        name, number = re.fullmatch(r"(.*?)((?:\d+(?:\.\d+)?)?)", own, re.DOTALL).groups()  # type: ignore[union-attr]
        if not number or name not in CODECS:
            return cls(own, None, parts)
        return cls(name, float(number) if "." in number else int(number), parts)

    def build(self, geometry: Geometry) -> Codec:
        """The codec for such vectors; raises ValueError where the family does not support them."""
        return CODECS[self.name].build(self, geometry)

    def __str__(self) -> str:
        if self.name == PER_HEAD:
            return "/".join(map(str, self.parts))
        return "+".join([f"{self.name}{'' if self.bits is None else self.bits}", *map(str, self.parts)])


@dataclass(frozen=True)
class LayerSpec:
    """The codecs of one layer's keys and values."""

    key: CodecSpec
    value: CodecSpec

    @classmethod
    def parse(cls, text: str) -> LayerSpec:
        split = re.fullmatch(r"\s*([\w.+]+):k([\d.]+)v([\d.]+)\s*", text)
        if split:
            name, key, value = split.groups()
            return cls(CodecSpec.parse(name + key), CodecSpec.parse(name + value))
        both = CodecSpec.parse(text)
        return cls(both, both)

    def split(self) -> str | None:
        """The short form of both, such as trellis:k4v2; None where they differ in more than the last number."""
        if self.key == self.value:
            return str(self.key)
        key, value = (re.fullmatch(r"([\w.+]*?[a-z]\w*?)(\d+(?:\.\d+)?)", str(s)) for s in (self.key, self.value))
        if key and value and key[1] == value[1] and LayerSpec.parse(f"{key[1]}:k{key[2]}v{value[2]}") == self:
            return f"{key[1]}:k{key[2]}v{value[2]}"
        return None

    def __str__(self) -> str:
        return self.split() or f"key={self.key},value={self.value}"


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
    basis: where codecs learn means and bases from: "prompt", each row from its own first tokens; "shared", all rows of
        a batch from the first ones of them all; or a .safetensors file that `kvcompress calibrate --basis` wrote.
    """

    key: CodecSpec = field(default_factory=lambda: LayerSpec.parse(DEFAULT_SPEC).key)
    value: CodecSpec = field(default_factory=lambda: LayerSpec.parse(DEFAULT_SPEC).value)
    sinks: int = 4
    window: int = 128
    layers: Mapping[int, LayerLike] = field(default_factory=dict, hash=False)
    basis: str = "prompt"

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", _as_codec(self.key, "key"))
        object.__setattr__(self, "value", _as_codec(self.value, "value"))
        for name in ("sinks", "window"):
            count = getattr(self, name)
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise ValueError(f"{name} must be a number of tokens, 0 or more, got {count!r}")
        if self.basis not in ("prompt", "shared") and not str(self.basis).endswith(".safetensors"):
            raise ValueError(f"basis must be 'prompt', 'shared' or a .safetensors file, got {self.basis!r}")
        object.__setattr__(self, "basis", str(self.basis))
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
        result = cls()
        for position, part in enumerate(spec.split(",")):
            name, equals, value = (s.strip() for s in part.partition("="))
            if not equals and position == 0:
                result = _named(name)
            elif equals and name in ("key", "value"):
                sides: dict[str, Any] = {name: CodecSpec.parse(value)}
                result = replace(result, **sides)
            elif equals and name in ("sinks", "window"):
                counts: dict[str, Any] = {name: _tokens(name, value)}
                result = replace(result, **counts)
            elif equals and name == "basis":
                result = replace(result, basis=value)
            elif equals and (layer := re.fullmatch(r"layer(-?\d+)(?:\.(key|value))?", name)):
                result = replace(result, layers={**result.layers, int(layer[1]): result._except(layer, value)})
            else:
                raise ValueError(
                    f"cannot read {part.strip()!r} in the spec {spec!r}: expected a codec (trellis3, trellis:k4v2), "
                    "then settings key=CODEC, value=CODEC, sinks=TOKENS, window=TOKENS, basis=prompt|shared|FILE, "
                    "layerINDEX=CODEC, layerINDEX.key=CODEC, layerINDEX.value=CODEC"
                )
        return result

    def _except(self, layer: re.Match[str], value: str) -> LayerSpec:
        """The layer that `layerN=VALUE`, `layerN.key=VALUE` or `layerN.value=VALUE` stands for."""
        if layer[2] is None:
            return LayerSpec.parse(value)
        before = _as_layer(self.layers.get(int(layer[1]), LayerSpec(self.key, self.value)))
        return replace(before, **{layer[2]: CodecSpec.parse(value)})

    def __str__(self) -> str:
        default = CacheSpec()
        parts = [str(LayerSpec(self.key, self.value))]
        settings = ("sinks", "window", "basis")
        parts += [f"{n}={getattr(self, n)}" for n in settings if getattr(self, n) != getattr(default, n)]
        for index, layer in self.layers.items():
            layer = _as_layer(layer)
            short = layer.split()
            sides = [f"layer{index}={short}"] if short else [f"layer{index}.key={layer.key}"]
            parts += sides if short else [*sides, f"layer{index}.value={layer.value}"]
        return ",".join(parts)

    def to_json(self) -> str:
        layers = {str(i): _as_layer(v) for i, v in self.layers.items()}
        content = {
            "version": JSON_VERSION,
            "key": _codec_content(self.key),
            "value": _codec_content(self.value),
            "sinks": self.sinks,
            "window": self.window,
            "basis": self.basis,
            "layers": {i: {"key": _codec_content(v.key), "value": _codec_content(v.value)} for i, v in layers.items()},
        }
        return json.dumps(content)

    @classmethod
    def from_json(cls, text: str) -> CacheSpec:
        """The inverse of `to_json`; raises ValueError for another version or unknown fields."""
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("version") != JSON_VERSION:
            version = content.get("version") if isinstance(content, dict) else None
            raise ValueError(f"expected a CacheSpec of JSON version {JSON_VERSION}, got version {version!r}")
        known = {"version", "key", "value", "sinks", "window", "basis", "layers"}
        if set(content) - known:
            raise ValueError(f"unknown fields {sorted(set(content) - known)}; known: {sorted(known)}")
        try:
            layers = {
                int(i): LayerSpec(_codec_from(v["key"]), _codec_from(v["value"]))
                for i, v in content.get("layers", {}).items()
            }
            key, value = (_codec_from(content[side]) for side in ("key", "value"))
            return cls(key, value, content["sinks"], content["window"], layers, content.get("basis", "prompt"))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a CacheSpec: {error}") from error


def _named(text: str) -> CacheSpec:
    """What a spec's first part stands for: codecs, a preset, or a JSON file. Raises OSError where that is missing."""
    from kvcompress.presets import PRESETS

    if text in PRESETS:
        return PRESETS[text].spec()
    if text.endswith(".json"):
        return CacheSpec.from_json(Path(text).read_text("utf-8"))
    both = LayerSpec.parse(text)
    return CacheSpec(both.key, both.value)


def _codec_content(spec: CodecSpec) -> dict[str, Any]:
    content: dict[str, Any] = {"name": spec.name, "bits": spec.bits}
    return content | ({"parts": [_codec_content(part) for part in spec.parts]} if spec.parts else {})


def _codec_from(content: dict[str, Any]) -> CodecSpec:
    known = {name: value for name, value in content.items() if name != "parts"}
    return CodecSpec(**known, parts=tuple(_codec_from(part) for part in content.get("parts", ())))


def _tokens(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} must be a number of tokens, got {text!r}") from None
