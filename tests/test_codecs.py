"""What single codecs promise; the contract that all share is in test_contract.py."""

import json
import math
from importlib import resources

import pytest
import torch

from kvcompress.codecs import Band, Codec, trellis
from kvcompress.codecs.exact import Raw
from kvcompress.codecs.fp8 import Cast
from kvcompress.codecs.lloyd import LloydMax, codebook, exact_codebook, grid
from kvcompress.codecs.scale import best_gain, normalise
from kvcompress.codecs.transforms import Hadamard, Identity, hadamard_matrix
from kvcompress.codecs.trellis import Trellis

CPU = torch.device("cpu")


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distortion(levels, borders):
    """The mean squared error for the unit Gaussian, in closed form: 1 - 2 sum l E[x] + sum l^2 P, over the cells."""
    edges = torch.cat([borders.new_tensor([-math.inf]), borders, borders.new_tensor([math.inf])])
    first = -(torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)).diff()
    mass = (torch.erf(edges / math.sqrt(2)) / 2).diff()
    return (1 - 2 * (levels * first).sum() + (levels.square() * mass).sum()).item()


# Max's table (1960) of least distortions for the unit Gaussian, whose last digits are off by up to 0.25%
@pytest.mark.parametrize(("bits", "known"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497), (5, 0.002499)])
def test_lloyd_max_codebooks_reach_the_known_distortion(bits, known):
    for own in (codebook, exact_codebook):
        levels, borders = (x.double() for x in own(bits, CPU))
        grid_costs = 4e-3 if own is codebook and bits == 5 else 0  # see below
        assert distortion(levels, borders) == pytest.approx(known * (1 + grid_costs), rel=3e-3)
        assert torch.allclose(levels, -levels.flip(0), atol=1e-6)


# Measured: 0, 4e-7, 1.3e-5, 0.22% and 0.37%, of the best levels wherever they lie; float32 levels account for 1e-6
@pytest.mark.parametrize(("bits", "excess"), [(1, 0.0), (2, 5.6e-7), (3, 2.57e-4), (4, 2.22e-3), (5, 3.71e-3)])
def test_levels_on_a_byte_grid_cost_next_to_nothing(bits, excess):
    ours, exact = (distortion(*(x.double() for x in own(bits, CPU))) for own in (codebook, exact_codebook))
    assert -1e-6 <= ours / exact - 1 <= excess + 1e-6


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_a_grid_has_bytes_as_kernels_look_them_up(bits):
    """Below 128; of five bits the upper half are 255 less the lower half."""
    own = grid(bits)
    assert max(own.bytes[:16]) < 128
    assert own.offset == 127.5 if bits == 5 else own.bytes[0] == 0
    assert {low + high for low, high in zip(own.bytes, reversed(own.bytes), strict=True)} == {2 * own.offset}
    levels, borders = codebook(bits, CPU)
    assert torch.equal(levels, ((torch.tensor(own.bytes).double() - own.offset) * own.step).float())
    assert torch.allclose(borders, (levels[1:] + levels[:-1]) / 2, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_no_grid_beside_it_is_better(bits):
    """Neither another step nor two bytes, one on each side, one further out or in, at any step within 1%."""
    own, half = grid(bits), 2 ** (bits - 1)

    def least(bytes_, steps):
        sizes = torch.tensor(bytes_, dtype=torch.float64) - bytes_[-1] / 2 - bytes_[0] / 2
        return min(distortion(x, (x[1:] + x[:-1]) / 2) for x in (sizes * step for step in steps))

    best = least(own.bytes, [own.step])
    around = [own.step * (1 + i / 1000) for i in range(-10, 11)]
    assert least(own.bytes, around) >= best - 1e-15
    for moved in range(half):
        for by in (-1, 1):
            other = list(own.bytes)
            other[moved] -= by
            other[-1 - moved] += by
            assert least(other, around) > best


def test_more_bits_lie_on_no_grid():
    with pytest.raises(ValueError, match="1, 2, 3, 4, 5 bits lie on a byte grid, those of 6 do not"):
        grid(6)


# The bounds that the project set itself: Lloyd-Max has 0.1175, 0.0345, 0.0095; 3 bits at best 0.0156 (rate-distortion)
@pytest.mark.parametrize(("bits", "bound"), [(2, 0.082), (3, 0.0230), (4, 0.0075)])
def test_trellis_distortion_on_gaussian_vectors(bits, bound):
    vectors = gaussian(1, 1, 2048, 128)
    quantiser = Trellis(bits)
    error = (vectors - quantiser.decode(quantiser.encode(vectors), 128)).square().mean().item()
    assert 4.0**-bits < error <= bound


def brute_force(targets, levels, bits, seam):
    """The least cost of all circular streams through `seam`, element by element over every state."""
    states = 2 ** (9 - bits)
    cost = {seam: 0}
    for target in targets.tolist():
        step = {}
        for state, so_far in cost.items():
            for code in range(2**bits):
                window = state << bits | code
                total = so_far + (target - levels[window].item()) ** 2
                new = window & (states - 1)
                step[new] = min(step.get(new, math.inf), total)
        cost = step
    return cost[seam]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_viterbi_finds_the_cheapest_stream(bits):
    levels = trellis.shipped_table(bits, CPU).levels
    targets = (gaussian(12, 1, seed=bits) * 140).round().int()
    seam = torch.tensor([5])
    path = trellis.viterbi(targets, levels, bits, seam)
    codes = (path & (2**bits - 1)).mT
    assert path[-1].item() == 5
    before = torch.cat([seam[None], path[:-1]])
    cost = (targets - levels[(before << bits | codes.mT)]).square().sum().item()
    assert cost == brute_force(targets.flatten(), levels, bits, 5)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_windows_of_a_stream_follow_the_encoder(bits):
    """A stream that bites its tail reads the same from the packed codes as along the encoder's path."""
    table = trellis.shipped_table(bits, CPU)
    codes = trellis.encode(gaussian(5, 32, seed=3), table.levels, table.step, bits)
    windows = trellis.windows(codes, bits)
    stream = [code >> b & 1 for code in codes[0].tolist() for b in range(bits - 1, -1, -1)]
    for t in range(32):
        bits_before = [stream[(bits * (t + 1) - 9 + i) % len(stream)] for i in range(9)]
        assert windows[0, t].item() == int("".join(map(str, bits_before)), 2)


def test_trellis_tables_are_bytes_whose_sums_are_bytes():
    content = json.loads(resources.files("kvcompress.codecs").joinpath("trellis_tables.json").read_text())
    assert set(content) == {"1", "2", "3", "4"}
    for entry in content.values():
        tables = torch.tensor(entry["tables"])
        assert tables.shape == (3, 8)
        assert tables.min() >= 0
        assert tables.amax(dim=1).sum() <= 256  # rounding may lift the sum of three maxima by one
        assert trellis.additive_sums(tables, 3)[0b101_011_110] == tables[0, 0b110] + tables[1, 0b011] + tables[2, 0b101]


def test_encoding_in_blocks_changes_nothing(monkeypatch):
    vectors = gaussian(1, 1, 104, 64)
    whole = Trellis(3).encode(vectors)
    monkeypatch.setattr(trellis, "BLOCK", 7)
    assert all(torch.equal(whole[name], part) for name, part in Trellis(3).encode(vectors).items())


@pytest.mark.parametrize("size", [8, 10, 16, 64, 80, 96, 112, 128, 192, 256])
def test_hadamard_is_orthogonal_at_every_size(size):
    matrix = hadamard_matrix(size, CPU)
    assert matrix.shape == (-(-size // 8) * 8, size)
    assert torch.allclose(matrix.mT @ matrix, torch.eye(size), atol=1e-5)


def test_hadamard_spreads_an_outlier():
    spread = hadamard_matrix(128, CPU) @ torch.nn.functional.one_hot(torch.tensor(3), 128).float()
    assert torch.allclose(spread.abs(), torch.full((128,), 128**-0.5))


@pytest.mark.parametrize("size", [4, 7, 65, 258])
def test_sizes_that_no_rotation_supports(size):
    with pytest.raises(ValueError, match=f"even and in 8..256 for this codec, got {size}"):
        Hadamard(size)


def test_the_gain_is_the_least_squares_one():
    y, shape = gaussian(50, 64), gaussian(50, 64, seed=1)
    gain = best_gain(y, shape).float().unsqueeze(-1)
    error = (y - gain * shape).square().sum()
    for factor in (0.99, 1.01):
        assert (y - factor * gain * shape).square().sum() > error
    assert torch.equal(normalise(torch.zeros(2, 8)), torch.zeros(2, 8))


def test_fp8_saturates():
    x = torch.tensor([[[[1e6, -1e6, 0.0, 1.0, 448.0, -448.0, 0.5, 2.0]]]])
    assert Cast().decode(Cast().encode(x), 8).flatten().tolist() == [448.0, -448.0, 0.0, 1.0, 448.0, -448.0, 0.5, 2.0]


def test_a_zero_vector_stays_zero():
    zero = torch.zeros(1, 1, 8, 64)
    for quantiser in (LloydMax(3), Trellis(3), Raw(), Cast()):
        assert torch.equal(quantiser.decode(quantiser.encode(zero), 64), zero)


def test_bands_must_cover_the_transform():
    with pytest.raises(ValueError, match="the bands cover 32 dimensions, the transform yields 64"):
        Codec(64, Identity(64), (Band(32, Raw()),))


def test_centring_pays_off_by_the_energy_of_the_mean():
    """Keys with a common offset of 3 standard deviations: the plain rotation loses 10 dB, the centred codec nothing."""
    x = gaussian(1, 1, 512, 128) + 3 * gaussian(128, seed=5)
    rank = Hadamard(128)
    errors = []
    for centred in (True, False):
        codec = Codec(128, rank, (Band(128, Trellis(3)),), centred=centred)
        fit = codec.fit(x[:, :, :128])
        errors.append((codec.restore(codec.decode(codec.encode(x, fit), fit), fit) - x).square().mean().item())
    assert errors[0] == pytest.approx(0.0225, rel=0.05)  # what a unit Gaussian costs at 3 bits
    assert errors[1] > 8 * errors[0]  # the energy is 1 + 9 times as large
