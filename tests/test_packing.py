import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress import packing


def random_codes(*shape, bits, seed=0):
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=80, deadline=None)
@given(
    bits=st.integers(1, 8),
    octets=st.integers(1, 9),
    eights=st.integers(1, 33),
    lead=st.sampled_from([(), (1,), (3, 2)]),
    seed=st.integers(0, 1000),
)
def test_round_trip_takes_exactly_the_bits(bits, octets, eights, lead, seed):
    tokens, width = 8 * octets, 8 * eights
    codes = random_codes(*lead, tokens, width, bits=bits, seed=seed)
    packed = packing.pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*lead, tokens * width * bits // 8) == (*lead, packing.packed_bytes(tokens, width, bits))
    assert packing.packed_tokens(packed.shape[-1], width, bits) == tokens
    assert torch.equal(packing.unpack(packed, bits, tokens, width), codes.to(torch.uint8))


def words_of(codes, bits):
    """The documented layout, written out code by code: [T][W] to words of 32 bits, for at most four bits."""
    tokens, width = codes.shape
    lanes = 4 if width % 16 == 0 else 2
    spans = width // (4 * lanes)
    words = []
    for s in range(spans):
        for octet in range(tokens // 8):
            for lane in range(lanes):
                first = 4 * (lane * spans + s)
                c = codes[8 * octet : 8 * octet + 8, first : first + 4].T.tolist()  # c[q][n]
                nibbles = {
                    1: lambda i, n, c=c: c[3][n] | c[2][n] << 1 | c[1][n] << 2 | c[0][n] << 3,
                    2: lambda i, n, c=c: c[2 * i + 1][n] | c[2 * i][n] << 2,
                    3: lambda i, n, c=c: c[i][n] | (c[3][n] >> i & 1) << 3,
                    4: lambda i, n, c=c: c[i][n],
                }[bits]
                words += [sum(nibbles(i, n) << 4 * n for n in range(8)) for i in range(bits)]
    return words


def as_words(packed):
    return (packed.view(torch.int32).to(torch.int64) & 0xFFFFFFFF).tolist()


@pytest.mark.parametrize("width", [8, 16, 24, 64, 80])  # two lanes and four, one block a lane and more
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_words_are_those_of_the_documented_layout(bits, width):
    codes = random_codes(24, width, bits=bits)
    assert as_words(packing.pack(codes, bits)) == words_of(codes, bits)


@pytest.mark.parametrize("bits", [5, 6, 8])
def test_more_than_four_bits_are_two_planes(bits):
    codes = random_codes(16, 48, bits=bits)
    low, high = packing.pack(codes, bits).split([16 * 48 // 2, 16 * 48 * (bits - 4) // 8])
    assert as_words(low) == words_of(codes & 15, 4)
    assert as_words(high) == words_of(codes >> 4, bits - 4)


def test_a_lane_holds_consecutive_dimensions():
    """Of [S, T / 8, 4, bits] words a lane's are S blocks: dimensions 32 l to 32 l + 31 of 128."""
    codes = torch.zeros(8, 128, dtype=torch.uint8)
    codes[:, 32:64] = 15
    words = packing.pack(codes, 4).view(torch.int32).view(8, 1, 4, 4)
    assert bool((words[:, :, 1] == -1).all())
    assert int(words.count_nonzero()) == 8 * 4


def test_views_of_wider_records_are_unpacked_in_place():
    """As the parts of pages lie in their slab: strided, 16 bytes aligned."""
    codes = random_codes(3, 2, 64, 32, bits=3)
    packed = packing.pack(codes, 3)
    slab = torch.full((3, 32 + 2 * 768 + 16), 255, dtype=torch.uint8)
    part = slab[:, 32:-16].unflatten(1, (2, 768))
    part.copy_(packed)
    assert torch.equal(packing.unpack(part, 3, 64, 32), codes.to(torch.uint8))


@pytest.mark.parametrize(
    ("tokens", "width", "bits", "message"),
    [
        (12, 8, 3, "multiples of 8, got 12 and 8"),
        (8, 12, 3, "multiples of 8, got 8 and 12"),
        (0, 8, 3, "got 0 and 8"),
        (8, 8, 0, "1..8, got 0"),
        (8, 8, 9, "1..8, got 9"),
    ],
)
def test_what_cannot_be_packed(tokens, width, bits, message):
    with pytest.raises(ValueError, match=message):
        packing.pack(torch.zeros(tokens, width, dtype=torch.uint8), bits)


def test_a_wrong_number_of_bytes():
    with pytest.raises(ValueError, match="8 tokens of 64 codes of 3 bits take 192 bytes, got 193"):
        packing.unpack(torch.zeros(193, dtype=torch.uint8), 3, 8, 64)
    with pytest.raises(ValueError, match="take 192 bytes, 200 are no multiple of that"):
        packing.packed_tokens(200, 64, 3)
