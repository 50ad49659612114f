"""Low rank: what it keeps, jointly and before RoPE; residuals; codecs by head; all of them end to end."""

import copy

import pytest
import torch
from transformers import DynamicCache

from benchmarks.texts import load
from kvcompress import CacheSpec, CompressedCache, models
from kvcompress import basis as bases
from kvcompress.codecs import Geometry
from kvcompress.codecs.lowrank import rank_for_energy
from kvcompress.codecs.residual import TOGETHER
from kvcompress.history import History
from kvcompress.rope import Rope
from kvcompress.spec import CodecSpec
from kvcompress.store import PAGE
from tests.families import build, prompt
from tests.test_contract import Turn, gaussian, round_trip, stored


def codec(text, head_dim=64, side=1, heads=2):
    return CodecSpec.parse(text).build(Geometry(head_dim, side, heads))


def error(text, x, **geometry):
    """The squared error's share of the energy about the mean, of tokens that the codec was fitted to."""
    y = round_trip(codec(text, x.shape[-1], heads=x.shape[1], **geometry), x)
    return ((y - x).square().sum() / (x - x.mean(dim=2, keepdim=True)).square().sum()).item()


def coloured(rows=1, heads=2, tokens=512, width=64, seed=0):
    """Vectors whose principal variances fall by a tenth from each to the next, with a mean."""
    scales = 0.9 ** (torch.arange(width) / 2)
    turn = torch.linalg.qr(gaussian(heads, width, width, seed=seed + 1)).Q
    return (gaussian(rows, heads, tokens, width, seed=seed) * scales) @ turn + 3 * gaussian(width, seed=seed + 2)


def coded(keys, values, x, **options):
    """A history of x as keys and as values, coded as a whole."""
    history = History(codec(keys, x.shape[-1], 0), codec(values, x.shape[-1], 1), 4, 32, rotation=Turn(), **options)
    history.append(x, x, [x.shape[2]] * len(x))
    history.code()
    return history


class TestLowRank:
    @pytest.mark.parametrize("text", ["lowrank64", "jointrank128"])
    def test_full_rank_is_exact_to_float16(self, text):
        # rounding to 11 bits: a relative error of 2^-12 at most, 2^-12 / sqrt(3) or so in the mean, 76 dB; white by the
        # basis, whose weakest components are coded as finely as the strongest
        assert error(text, coloured()) < 10**-7.2

    @pytest.mark.parametrize("rank", [8, 20, 32, 48])
    def test_error_is_the_sum_of_the_eigenvalues_left_out(self, rank):
        x = coloured()
        centred = (x - x.mean(dim=2, keepdim=True)).double()
        values = torch.linalg.eigvalsh(centred.mT @ centred)
        left_out = values[..., : 64 - rank].sum() / values.sum()
        # bytes hold a basis to about 0.3% of each column: 1e-5 of the energy, rightly or wrongly
        assert error(f"lowrank{rank}", x) == pytest.approx(left_out.item(), rel=0.01, abs=3e-5)

    @pytest.mark.parametrize("rank", [16, 48])
    def test_error_counts_by_the_metric(self, rank):
        """Channels scaled by s and the metric by 1/s^2 change nothing: outlier channels are not noticed."""
        x, scale = coloured(), torch.logspace(-1, 1, 64)
        metric = torch.eye(64).expand(1, 2, 64, 64)
        plain = codec(f"lowrank{rank}")
        fits = plain.fit(x, metric), plain.fit(x * scale, metric / scale / scale.unsqueeze(1))
        ys = [plain.restore(plain.decode(plain.encode(v, f), f), f) for v, f in zip((x, x * scale), fits, strict=True)]
        errors = [(ys[0] - x).square().mean().item(), (ys[1] / scale - x).square().mean().item()]
        assert errors[1] == pytest.approx(errors[0], rel=0.01)
        blind = plain.fit(x * scale)
        y = plain.restore(plain.decode(plain.encode(x * scale, blind), blind), blind) / scale
        assert (y - x).square().mean().item() > 1.5 * errors[0]

    def test_stores_the_smaller_of_two_matrices_and_a_whole_basis(self):
        """In eights of rows."""
        for rank, numbers in ((8, 2 * 8 * 64), (24, 2 * 24 * 64), (31, 2 * 32 * 64), (32, 64 * 64), (64, 64 * 64)):
            fit = codec(f"lowrank{rank}").fit(coloured())
            assert sum(x[0, 0].numel() for x in fit.values() if x.dtype == torch.uint8) == numbers
            assert all(x.shape[:2] == (1, 2) for x in fit.values())

    def test_a_part_codes_the_coefficients(self):
        """Their noise lies as far below what is kept as white vectors' does for 4 bits, 21.7 dB, or farther."""
        x = coloured()
        kept, own = 1 - error("lowrank32", x), error("lowrank32+trellis4", x) - error("lowrank32", x)
        assert kept / own > 10**2.17
        assert codec("lowrank32+trellis4").bits_per_element(torch.bfloat16) == (4 * 32 + 16) / 64

    def test_wide_joint_coefficients_are_coded_in_runs(self):
        four = codec("jointrank520+trellis3", 256, heads=4)
        assert [band.width for band in four.bands] == [176, 176, 168]
        assert four.bits_per_element(torch.float32) == (3 * 520 + 3 * 16) / 1024

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("lowrank65", "lowrank65 must be at most head_dim, which is 64"),
            ("jointrank129", r"at most heads \* head_dim, which is 2 \* 64 = 128"),
            ("residual64+trellis2", None),
            ("lowrank257", "takes lowrank1 to lowrank256|takes 1 to 256, got 257"),
            ("lowrank12+trellis3", "must be a multiple of 8 for a codec to code it"),
            ("lowrank12", None),
            ("lowrank32+lowrank16", "learns nothing but a mean .* got lowrank16"),
            ("lowrank64+spectral3", "learns nothing but a mean .* got spectral3"),
            ("lowrank32+trellis4/trellis3/trellis2", "for 3 KV heads, the layer has 2"),
            ("lowrank32+exact", "lowrank32 alone stores float16"),
            ("lowrank32+kvquant3", "learns nothing but a mean"),
            ("prerope+lowrank32/trellis3", "same frame of RoPE, got prerope.lowrank32 in 'token', trellis3 in 'fixed'"),
        ],
    )
    def test_refusals_say_what_is_accepted(self, text, message):
        if message is None:
            assert codec(text, side=0).head_dim == 64
            return
        with pytest.raises(ValueError, match=message):
            codec(text, side=0)


class TestRankForEnergy:
    def test_counts_directions_of_equal_strength(self):
        """24 equal directions of 64: 0.9 of the energy takes 21.6 of them, 24 as a multiple of 8; a third takes 8."""
        x = torch.cat([gaussian(1, 2, 20000, 24), torch.zeros(1, 2, 20000, 40)], dim=-1) + 5
        assert [rank_for_energy(x, None, share, False) for share in (0.33, 0.9, 1.0)] == [8, 24, 24]
        assert rank_for_energy(x, None, 0.9, True) == 48

    def test_metric_decides_which_count(self):
        metric = torch.diag_embed(torch.cat([torch.ones(8), torch.full((56,), 1e-4)])).expand(1, 2, 64, 64)
        x = gaussian(2, 2, 1000, 64)
        assert rank_for_energy(x, None, 0.9, False) > 48
        assert rank_for_energy(x, metric, 0.9, False) == 8

    def test_codec_of_that_rank_keeps_the_energy(self):
        x = coloured()
        rank = rank_for_energy(x, None, 0.95, False)
        assert error(f"lowrank{rank}", x) < 0.05 + 1e-4 < error(f"lowrank{rank - 8}", x)

    def test_refuses_a_share_above_one(self):
        with pytest.raises(ValueError, match=r"share above 0 and at most 1, got 1\.5"):
            rank_for_energy(gaussian(1, 1, 64, 16), None, 1.5, False)


class TestJoint:
    def test_heads_that_say_the_same_are_stored_once(self):
        """16 directions in common: 16 joint coefficients hold all but the noise, 8 of each head only half of it."""
        common = gaussian(1, 1, 512, 16)
        x = common @ gaussian(2, 16, 64, seed=1) / 4 + 0.05 * gaussian(1, 2, 512, 64, seed=2)
        assert error("jointrank16", x) < 0.005  # of the noise's 0.25%
        assert error("lowrank8", x) > 0.2
        bits = [codec(text).bits_per_element(torch.float32) for text in ("jointrank16", "lowrank8")]
        assert bits == [2.0, 2.0]

    def test_independent_heads_lose_nothing_by_it(self):
        """Equal spectra in both heads: the 32 strongest of all are about 16 of each."""
        x = coloured()
        assert error("jointrank32", x) == pytest.approx(error("lowrank16", x), rel=0.1)

    def test_one_head_is_lowrank(self):
        x = coloured(heads=1)
        assert torch.equal(*(round_trip(codec(text, heads=1), x) for text in ("lowrank24", "jointrank24")))


class TestPreRope:
    def stationary(self, tokens=2048):
        """Keys of 16 directions before RoPE, rotated to their positions."""
        x = gaussian(1, 2, tokens, 16) @ gaussian(2, 16, 64, seed=1)
        return Turn().apply(x, torch.arange(tokens).unsqueeze(0))

    def test_rotation_spreads_the_energy(self):
        x = self.stationary()
        before = Turn().undo(x, torch.arange(x.shape[2]).unsqueeze(0))
        assert rank_for_energy(before, None, 0.99, False) == 16
        assert rank_for_energy(x, None, 0.99, False) >= 32

    def test_keys_before_rope_take_fewer_directions(self):
        x = self.stationary()
        shares = []
        for text in ("prerope+lowrank16", "lowrank16"):
            dense = coded(text, "exact", x).dense(0)
            shares.append(((dense - x).square().sum() / x.square().sum()).item())
        assert shares[0] < 1e-4  # all directions are there: what bytes lose of the basis, and float16
        assert shares[1] > 0.1

    def test_the_embedded_models_keys(self):
        """Half of the directions, learned from 512 tokens, lose 9% of the next 1532 before RoPE and 31% after it."""
        model, tokenizer = models.embedded()
        (ids,) = load(tokenizer, None, 0).windows(1, 2048)
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(ids, past_key_values=cache)
        rope, positions = Rope(model.config, 64), torch.arange(2048).unsqueeze(0)
        half, lost = codec("lowrank32"), []
        for layer in cache.layers:
            for x in (rope.undo(layer.keys, positions), layer.keys):
                fit, later = half.fit(x[:, :, 4:516]), x[:, :, 516:]
                y = half.restore(half.decode(half.encode(later, fit), fit), fit)
                variance = (later - later.mean(dim=2, keepdim=True)).square().sum()
                lost.append(((y - later).square().sum() / variance).item())
        before, after = sum(lost[::2]) / 5, sum(lost[1::2]) / 5
        assert 0.05 < before < 0.12
        assert after > 3 * before


class TestResidual:
    def outliers(self):
        """Usual channels of 4 directions, and in every 32 one channel thirty times as strong, as keys of Qwen have."""
        x = gaussian(1, 2, 1024, 4) @ gaussian(2, 4, 64, seed=1) / 2 + 0.1 * gaussian(1, 2, 1024, 64, seed=2)
        x[..., ::32] *= 30
        return x

    def test_gives_back_what_a_coarse_grid_rounds_away(self):
        """Beside an outlier a token's usual channels fall between two levels of two bits: the residual is they.

        They take 4 of the 8 directions, the outliers' own errors 2; a rotation has spread these over all channels.
        """
        x, gains = self.outliers(), []
        for text in ("kivi2", "trellis2"):
            gains.append(10 * torch.tensor(error(text, x) / error(f"residual8+{text}", x)).log10().item())
        assert gains[0] > 6
        assert gains[1] < gains[0] - 3

    def test_a_rotated_codec_leaves_white_noise(self):
        """8 of 64 directions of white noise are an eighth of it, 0.6 dB, a little more where it was learned."""
        x = gaussian(1, 2, 1024, 64)
        gain = 10 * torch.tensor(error("trellis2", x) / error("residual8+trellis2", x)).log10().item()
        assert 0.5 < gain < 1.2

    def test_learns_from_pages(self):
        assert TOGETHER == PAGE

    def test_bits_are_those_of_both(self):
        both = [codec(text).bits_per_element(torch.float32) for text in ("residual8+trellis2", "trellis2")]
        assert both[0] - both[1] == 16 * 8 / 64

    def test_works_on_any_codec(self):
        x = coloured(tokens=704)
        for text in ("jointrank32", "spectral2", "trellis2/trellis3", "lowrank16+trellis4", "residual2+trellis2"):
            assert error(f"residual4+{text}", x) < error(text, x)


class TestHeads:
    @pytest.mark.parametrize("shared", [False, True])
    def test_are_the_single_codecs_side_by_side(self, shared):
        """Codes, what is learned (from 128 and from 512 tokens) and vectors, bit for bit."""
        x = coloured(rows=2, tokens=1000)
        both = coded("trellis4/lowrank32+trellis3", "lowrank16/trellis2", x, shared=shared)
        for head, (key, value) in enumerate([("trellis4", "lowrank16"), ("lowrank32+trellis3", "trellis2")]):
            alone = coded(key, value, x[:, head : head + 1], shared=shared)
            for name, part in stored(alone).items():
                side, rest = name.split(".", 1)
                assert torch.equal(stored(both)[f"{side}.{head}.{rest}"], part)
            for side in (0, 1):
                assert torch.equal(both.dense(side)[:, head], alone.dense(side)[:, 0])

    def test_heads_of_one_codec_are_a_group(self):
        x = coloured(heads=4)
        mixed = codec("trellis4/trellis3/trellis4/trellis2", heads=4)
        parts = mixed.encode(x, mixed.fit(x))
        assert {name: part.shape[1] for name, part in parts.items()} == {
            f"{group}.0.{name}": count for group, count in enumerate((2, 1, 1)) for name in ("codes", "gain")
        }
        whole = codec("trellis4", heads=4)
        assert torch.equal(round_trip(mixed, x)[:, 2], round_trip(whole, x)[:, 2])
        assert mixed.bits_per_element(torch.float32) == (4 + 3 + 4 + 2) / 4 + 16 / 64

    def test_basis_file_keeps_the_groups(self, tmp_path):
        x = coloured()
        fits = [codec(text, side=side).fit(x) for side, text in enumerate(("trellis4/lowrank32", "residual2+trellis2"))]
        own = bases.Basis(("trellis4/lowrank32", "residual2+trellis2"), tuple(fits))
        bases.save(tmp_path / "a.safetensors", {3: own})
        back = bases.load(tmp_path / "a.safetensors")[3]
        for fit, held in zip(fits, back.fits, strict=True):
            assert fit.keys() == held.keys()
            assert all(torch.equal(fit[name], held[name]) for name in fit)


SPECS = (
    "lowrank16",
    "lowrank24+trellis4",
    "prerope+lowrank16+trellis4",
    "jointrank32",
    "prerope+jointrank48+trellis4",
    "residual4+trellis2",
    "residual4+prerope+kivi2",
    "trellis4/trellis3",
    "lowrank16/jointrank8",
)


@pytest.fixture(scope="module")
def llama():
    return build("llama", head_dim=32)


@pytest.mark.parametrize("text", SPECS)
@torch.no_grad()
def test_end_to_end(llama, text):
    """Logits on codes are those of dense attention on the history decoded, to float32's precision."""
    ids = prompt(2, 720)
    llama.set_attn_implementation("kvcompress")
    cache = CompressedCache(llama.config, CacheSpec(CodecSpec.parse(text), CodecSpec.parse(text), window=32))
    llama(ids[:, :700], past_key_values=cache)
    dense = DynamicCache(config=llama.config)
    for index, layer in enumerate(cache.layers):
        assert min(layer.history.coded) == (700 - 4 - 32) // PAGE * PAGE
        dense.update(*(layer.history.dense(side) for side in (0, 1)), index)
    report = cache.memory()
    assert report.means == sum(
        x.nbytes for layer in cache.layers for fit in layer.history.fits for n, x in fit.items() if n.endswith("mean")
    )
    formula = [layer.history.codecs[side].bits_per_element(torch.float32) for layer in cache.layers for side in (0, 1)]
    assert 8 * (report.codes + report.scales) / report.coded_elements == pytest.approx(sum(formula) / len(formula))
    logits = llama(ids[:, 700:], past_key_values=copy.deepcopy(cache)).logits
    assert cache.stats() == {"fused": 2, "materialised": 0}
    llama.set_attn_implementation("sdpa")
    expected = llama(ids[:, 700:], past_key_values=dense).logits
    assert torch.allclose(logits, expected, atol=1e-4)
    llama.set_attn_implementation("kvcompress")
    given = {"input_ids": ids[:, :701], "attention_mask": torch.ones_like(ids[:, :701])}
    out = llama.generate(**given, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 705)
