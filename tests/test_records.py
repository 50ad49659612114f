"""Records of single tokens (kvcompress/records.py): they depend on one token only and hold what the codec does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvcompress import packing
from kvcompress.codecs import Geometry
from kvcompress.paged.blocks import BlockLayout
from kvcompress.records import TokenCodec, join_tokens, split_tokens, working
from kvcompress.spec import CodecSpec

#: A codec of every kind of part: trellis and scalar codes, two planes of bits, groups' scales, numbers as they are.
SPECS = ("trellis1", "trellis3", "trellis4", "lloyd3", "lloyd5", "lloyd8", "turboquant2", "fp8", "exact")


def vectors(tokens: int, heads: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, heads, width, generator=generator) + 0.5


def codec(spec: str, width: int, side: int = 0, heads: int = 2, **rest: object) -> TokenCodec:
    return TokenCodec.of(CodecSpec.parse(spec), Geometry(width, side, heads), **rest)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("tokens", "width"), [(8, 64), (64, 16), (64, 24), (16, 8)])
def test_nibbles_of_tokens(bits: int, tokens: int, width: int) -> None:
    """A token's nibbles change with its codes only, and all of them together are the packed codes."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (2, tokens, width), generator=generator)
    packed = packing.pack(codes, bits)
    nibbles = split_tokens(packed, bits, tokens, width)
    assert nibbles.shape == (2, tokens, width * bits // 4)
    assert int(nibbles.max()) < 16
    assert torch.equal(join_tokens(nibbles, bits, width), packed)
    codes[:, 5] = 2**bits - 1 - codes[:, 5]
    changed = (split_tokens(packing.pack(codes, bits), bits, tokens, width) != nibbles).any(dim=-1)
    assert changed[:, 5].all()
    assert int(changed.sum()) == 2


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("width", [64, 20, 8])  # of 8 one-bit codes, a token takes as many bytes as an octet has tokens
def test_a_token_alone(spec: str, width: int) -> None:
    """13 tokens at once and each by itself have the same records, of the bytes that the codec's bits make."""
    own, x = codec(spec, width), vectors(13, 2, width)
    records = own.encode(x)
    assert records.shape == (13, 2, own.size)
    assert own.size * 8 == own.codec.bits_per_element(torch.float32) * width
    assert torch.equal(records, torch.cat([own.encode(x[i : i + 1]) for i in range(13)]))
    decoded = own.decode(records)
    # lone tokens are decoded beside seven of zeros: products with the rotation may be summed in another order
    alone = torch.cat([own.decode(records[i : i + 1]) for i in range(13)])
    torch.testing.assert_close(decoded, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("spec", [*SPECS, "kivi2"])
def test_records_hold_the_codes(spec: str) -> None:
    """What records decode to is what a page of the codec, without its mean, decodes to, to the last bit."""
    own, x = codec(spec, 64, side=1), vectors(16, 2, 64)
    page = x.transpose(0, 1).unsqueeze(0)
    whole = own.codec.restore(own.codec.decode(own.codec.encode(page, {}), {}), {})[0].transpose(0, 1)
    assert torch.equal(own.decode(own.encode(x)), whole)


def test_error_of_gaussians() -> None:
    """The distortions that README.md lists for vectors of 128, to 5%: 512 vectors of 128 give each to about 2%."""
    x = torch.randn(256, 2, 128, generator=torch.Generator().manual_seed(3))
    for spec, listed in (("trellis2", 0.0806), ("trellis3", 0.0217), ("trellis4", 0.0059)):
        own = codec(spec, 128)
        error = float((own.decode(own.encode(x)) - x).square().mean())
        assert abs(error / listed - 1) < 0.05


def test_a_mean_from_a_file() -> None:
    """With a mean of ten, which is what vectors share, the error is that of what is left; without it, of it all."""
    x = vectors(40, 2, 64) + 10
    mean = x.mean(dim=0).unsqueeze(0)
    with_it, without = codec("trellis3", 64, fit={"mean": mean}), codec("trellis3", 64)
    assert with_it.size == without.size
    errors = [float((own.decode(own.encode(x)) - x).square().mean()) for own in (with_it, without)]
    assert errors[0] < 0.03  # of unit variance, 0.0217 for Gaussians
    assert errors[1] > 20 * errors[0]  # the mean's energy is a hundred times the variance


def test_exact_keeps_the_dtype() -> None:
    own, x = codec("exact", 64, dtype=torch.bfloat16), vectors(5, 2, 64).bfloat16()
    assert own.size == 128
    assert torch.equal(own.decode(own.encode(x)), x.float())


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("spectral3", "frame that turns"),
        ("prerope+trellis3", "frame that turns"),
        ("kivi2", "tokens of a page together"),
        ("trellis3/trellis4", "heads together"),
        ("lowrank32", "calibrate --basis"),
    ],
)
def test_refusals_name_what_works(spec: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"{reason}.*These can: .*trellis3"):
        codec(spec, 64)


@pytest.mark.parametrize("spec", ["trellis3", "lloyd5", "fp8"])
def test_a_step_without_tokens(spec: str) -> None:
    """Nothing is written, as when a server runs an empty step to keep its processes together."""
    blocks = torch.full((2, BlockLayout(codec(spec, 64), codec(spec, 64, 1)).record.page_bytes), 7, dtype=torch.uint8)
    none = torch.zeros(0, 2, 64)
    BlockLayout(codec(spec, 64), codec(spec, 64, 1)).write(blocks, none, none, torch.zeros(0, dtype=torch.int64))
    assert (blocks == 7).all()


def test_a_wrong_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="learns mean, but was given basis"):
        codec("trellis3", 64, fit={"basis": torch.zeros(1, 2, 64)})


def test_working_codecs() -> None:
    """Those that need neither a prompt nor neighbours; NF4's blocks are of neighbours in memory."""
    keys, values = ({*working(Geometry(64, side, 2))} for side in (0, 1))
    assert keys >= {"exact", "fp8", "trellis1", "trellis4", "lloyd1", "lloyd8", "turboquant3"}
    assert not keys & {"kivi2", "nf4", "bnb8", "spectral3", "kvarn3", "kvquant3", "prerope+trellis3"}
    assert values >= keys | {"kivi2", "kivi8"}
