from pathlib import Path

import pytest

from kvcompress import CacheSpec, CodecSpec
from kvcompress.spec import CODECS, LayerSpec


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("trellis3", CacheSpec(CodecSpec("trellis", 3), CodecSpec("trellis", 3))),
        ("exact", CacheSpec(CodecSpec("exact"), CodecSpec("exact"))),
        ("fp8", CacheSpec(CodecSpec("fp8"), CodecSpec("fp8"))),  # the digit belongs to the name
        ("trellis:k4v2", CacheSpec(CodecSpec("trellis", 4), CodecSpec("trellis", 2))),
        ("lloyd2, window=64, sinks=0", CacheSpec("lloyd2", "lloyd2", sinks=0, window=64)),
        ("key=trellis4,value=lloyd2", CacheSpec("trellis4", "lloyd2")),
        (
            "trellis3,layer0=exact,layer-1=lloyd:k8v4",
            CacheSpec("trellis3", "trellis3", layers={0: "exact", -1: LayerSpec.parse("lloyd:k8v4")}),
        ),
    ],
)
def test_grammar_reads_and_writes(text, spec):
    assert CacheSpec.parse(text) == spec
    assert CacheSpec.parse(str(spec)) == spec
    assert CacheSpec.from_json(spec.to_json()) == spec
    assert hash(CacheSpec.parse(text)) == hash(spec)


def test_a_spec_passes_through():
    spec = CacheSpec(window=7)
    assert CacheSpec.parse(spec) is spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trelis3", r"unknown codec 'trelis3'; did you mean 'trellis'\? Known: .*exact, fp8, .*lloyd, .*trellis"),
        ("trellis9", "'trellis' takes 1, 2, 3, 4, got 9"),
        ("trellis", "needs a number: trellis1, trellis2"),
        ("exact3", "takes no number, got 3"),
        ("trellis3,window=-1", "window must be a number of tokens, 0 or more, got -1"),
        ("trellis3,window=many", "window must be a number of tokens, got 'many'"),
        ("trellis3,wndow=3", "cannot read 'wndow=3' in the spec"),
        ("trellis3,lloyd4", "cannot read 'lloyd4'"),
        ("", "unknown codec ''"),
    ],
)
def test_bad_text_says_what_would_be_accepted(text, message):
    with pytest.raises(ValueError, match=message):
        CacheSpec.parse(text)


def test_bad_types():
    with pytest.raises(TypeError, match="got int"):
        CacheSpec.parse(3)
    with pytest.raises(TypeError, match="key must be a CodecSpec or a string"):
        CacheSpec(key=3)
    with pytest.raises(ValueError, match="sinks must be a number of tokens, 0 or more, got True"):
        CacheSpec(sinks=True)
    with pytest.raises(ValueError, match="layer indices"):
        CacheSpec(layers={"0": "exact"})


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", '{"version": 2}', '{"version": 1, "key": {}, "value": {}, "sinks": 1, "window": 1}',
     '{"version": 1, "colour": "red"}'],
)  # fmt: skip
def test_bad_json(text):
    with pytest.raises(ValueError, match=r"version|unknown fields|not a CacheSpec"):
        CacheSpec.from_json(text)


def test_layers_take_their_own_codecs():
    spec = CacheSpec.parse("trellis3,layer0=exact,layer-1=trellis:k4v2")
    assert [str(spec.layer(i, 4)) for i in range(4)] == ["exact", "trellis3", "trellis3", "trellis:k4v2"]
    with pytest.raises(ValueError, match=r"names layer 0, but the model has 0|names layer -1, but the model has 0"):
        spec.layer(0, 0)
    mixed = CacheSpec(layers={0: LayerSpec(CodecSpec("exact"), CodecSpec("fp8"))})
    assert str(mixed).endswith("layer0.key=exact,layer0.value=fp8")
    assert CacheSpec.parse(str(mixed)) == mixed


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="codec 'exact' is registered already"):
        CODECS.register("exact")(lambda spec, head_dim: None)


def test_what_a_string_cannot_say_is_refused_or_made_alike():
    with pytest.raises(ValueError, match="codecs for each head cannot be a part of 'prerope'"):
        CodecSpec("prerope", None, (CodecSpec.parse("trellis4/trellis3"),))
    assert str(CodecSpec.parse("spectral3.0")) == "spectral3"
    spec = CacheSpec(basis=Path("x.safetensors"))
    assert CacheSpec.from_json(spec.to_json()) == spec == CacheSpec.parse(str(spec))


def test_json_of_strings_is_refused():
    with pytest.raises(ValueError, match="not a CacheSpec"):
        CacheSpec.from_json('{"version": 1, "key": "trellis3", "value": "trellis3", "sinks": 4, "window": 1}')
