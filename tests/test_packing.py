import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress import packing


@settings(max_examples=80, deadline=None)
@given(bits=st.integers(1, 8), eights=st.integers(1, 40), rows=st.integers(1, 3), seed=st.integers(0, 1000))
def test_round_trip_takes_exactly_the_bits(bits, eights, rows, seed):
    count = 8 * eights
    codes = torch.randint(0, 2**bits, (rows, 2, count), generator=torch.Generator().manual_seed(seed))
    packed = packing.pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, 2, count * bits // 8) == (rows, 2, packing.packed_bytes(count, bits))
    assert torch.equal(packing.unpack(packed, bits, count), codes.to(torch.uint8))


def test_three_bit_words_are_nibbles_ready_for_a_byte_permute():
    """The documented layout, read as the kernels read it: 32 codes from three words with masks and shifts only."""
    codes = torch.randint(0, 8, (32,), generator=torch.Generator().manual_seed(0))
    words = packing.pack(codes, 3).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    quarters = [word & 0x77777777 for word in words]
    tops = [word & 0x88888888 for word in words]
    quarters.append(tops[0] >> 3 | tops[1] >> 2 | tops[2] >> 1)
    nibbles = [int(q) >> 4 * n & 15 for q in quarters for n in range(8)]
    assert nibbles == codes.tolist()


@pytest.mark.parametrize(("bits", "mask"), [(1, 0x11111111), (2, 0x33333333), (4, 0xFFFFFFFF)])
def test_words_of_other_bits_give_eight_codes_a_mask(bits, mask):
    codes = torch.randint(0, 2**bits, (32,), generator=torch.Generator().manual_seed(1))
    words = (packing.pack(codes, bits).view(torch.int32).to(torch.int64) & 0xFFFFFFFF).tolist()
    quarters = [word >> shift & mask for word in words for shift in range(0, 4, bits)]
    assert [q >> 4 * n & 15 for q in quarters for n in range(8)] == codes.tolist()


@pytest.mark.parametrize(
    ("count", "bits", "message"),
    [(12, 3, "multiple of 8 codes, got 12"), (0, 3, "got 0"), (8, 0, "1..8, got 0"), (8, 9, "1..8, got 9")],
)
def test_what_cannot_be_packed(count, bits, message):
    with pytest.raises(ValueError, match=message):
        packing.pack(torch.zeros(count, dtype=torch.uint8), bits)


def test_a_wrong_number_of_bytes():
    with pytest.raises(ValueError, match="64 codes of 3 bits take 24 bytes, got 25"):
        packing.unpack(torch.zeros(25, dtype=torch.uint8), 3, 64)
