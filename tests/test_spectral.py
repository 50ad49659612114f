"""Balanced bases, frames and bands: what spectral codecs rest on."""

from dataclasses import replace

import pytest
import torch

from kvcompress import CacheSpec
from kvcompress.codecs import Geometry
from kvcompress.codecs.balanced import Balanced, matrix, stored
from kvcompress.codecs.scale import LOG
from kvcompress.codecs.spectral import PROFILES, profile
from kvcompress.history import History
from kvcompress.metric import query_metric
from kvcompress.spec import CodecSpec

D = 64


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uneven(count, seed=0):
    """Vectors whose variances fall by 1000 along random directions: [1, 2, count, D]."""
    basis = torch.linalg.qr(gaussian(2, D, D, seed=99)).Q
    return gaussian(1, 2, count, D, seed=seed) * torch.logspace(0, -1.5, D) @ basis.mT


def channel_scales(seed=1):
    return torch.exp(torch.rand(D, generator=torch.Generator().manual_seed(seed)) * 3.4)  # 1 to 30


def weighted_error(codec, x, query):
    """Mean squared error of scores over their variance."""
    metric = query_metric(query[0], 2).unsqueeze(0)
    fit = codec.fit(x[:, :, :512], metric)
    error = codec.restore(codec.decode(codec.encode(x, fit), fit), fit) - x
    return ((query @ error.mT).square().mean() / (query @ (x - x.mean(2, keepdim=True)).mT).square().mean()).item()


def test_outlier_channels_change_nothing():
    """Keys scaled by s and queries by 1/s, channel by channel: the same scores to 5%, where a rotation loses 10 dB."""
    x, query, s = uneven(1024), uneven(512, seed=5).flip(-1), channel_scales()
    spectral, trellis = (CodecSpec.parse(name).build(Geometry(D, 1, 2)) for name in ("spectral3", "trellis3"))
    plain, hard = weighted_error(spectral, x, query), weighted_error(spectral, x * s, query / s)
    assert hard == pytest.approx(plain, rel=0.05)
    assert weighted_error(trellis, x * s, query / s) > 10 * hard


def test_uneven_spectra_pay():
    """Variances that fall by 1000 leave 3 bits at least 3 dB less noise in scores than a rotation does."""
    x, query = uneven(1024), gaussian(1, 2, 512, D, seed=5)
    spectral, trellis = (CodecSpec.parse(name).build(Geometry(D, 1, 2)) for name in ("spectral3", "trellis3"))
    assert weighted_error(trellis, x, query) > 2 * weighted_error(spectral, x, query)


def test_components_are_balanced():
    """Uncorrelated but for the rounding to 4 bits and for shrinkage, strongest first, of variance below one."""
    x, transform = uneven(4096), Balanced(D, (16,) * 4)
    fit = transform.fit(x - x.mean(2, keepdim=True), None)
    y = (x - x.mean(2, keepdim=True)) @ transform.analysis(fit, x.device).mT
    variances = y.var(dim=2)
    assert variances.max() < 1.3
    assert (variances[..., :16].mean() - variances[..., -16:].mean()) > 0  # shrinkage leaves the weakest below one
    correlation = torch.corrcoef(y[0, 0].mT) - torch.eye(D)
    assert correlation.square().mean().sqrt() < 0.1


def test_the_analysis_is_the_inverse_of_what_is_stored():
    x, transform = uneven(512), Balanced(D, (32, 32))
    fit = transform.fit(x, None)
    y = x @ transform.analysis(fit, x.device).mT
    assert torch.allclose(y @ transform.synthesis(fit, x.device).mT, x, atol=1e-4)
    assert fit["basis"].nbytes == 2 * D * D // 2  # two heads, four bits


@pytest.mark.parametrize("columns", [64, 13])
def test_a_stored_matrix_keeps_its_shape_and_scales(columns):
    values = gaussian(3, 10, columns) * torch.logspace(-3, 3, 10).unsqueeze(-1)
    error = matrix(stored(values, bits=8), bits=8) - values
    assert error.shape == values.shape
    assert (error.square().mean(-1) / values.square().mean(-1)).max() < 3e-4  # half a step of 127, uniform


def test_a_constant_head_can_be_coded():
    x = torch.ones(1, 2, 512, D)
    codec = CodecSpec.parse("spectral3").build(Geometry(D, 1, 2))
    fit = codec.fit(x)
    assert torch.allclose(codec.restore(codec.decode(codec.encode(x, fit), fit), fit), x, atol=1e-5)


@pytest.mark.parametrize("head_dim", [8, 16, 24, 40, 64, 80, 96, 112, 128, 192, 256, 576])
@pytest.mark.parametrize("bits", PROFILES)
def test_bands_cover_every_head_size(head_dim, bits):
    bands = profile(head_dim, bits)
    assert sum(width for width, _ in bands) == head_dim
    assert all(width % 8 == 0 for width, _ in bands)
    average = sum(width * own for width, own in bands) / head_dim
    assert abs(average - bits) <= (
        0 if head_dim % 64 == 0 else 8 / head_dim + 1e-9
    )  # half a bit of the last unit, 16 wide


def test_other_head_sizes_are_refused():
    with pytest.raises(ValueError, match="multiple of 8 for spectral codecs, got 60"):
        CodecSpec.parse("spectral3").build(Geometry(60))


def test_log_gains():
    gain = torch.tensor([0.0, -1.0, 1e-9, 2.0**-8, 0.3, 1.0, 1.5, 200.0, 1e9, torch.nan])
    back = LOG.decode(LOG.encode(gain))
    assert back[:3].tolist() == [0.0, 0.0, 0.0]
    assert torch.allclose(back[4:8], gain[4:8], rtol=0.022)  # half a sixteenth of an octave
    assert back[8] < 250
    assert back[9].isnan()


def fitted(chunks, query, key, value):
    codecs = [CodecSpec.parse("spectral3").build(Geometry(D, side, 2)) for side in (0, 1)]
    history = History(*codecs, sinks=4, window=32)
    start = 0
    for length in chunks:
        part = slice(start, start + length)
        history.append(key[:, :, part], value[:, :, part], [length] * len(key), query[:, :, part])
        history.code()
        start += length
    return history


def test_the_metric_does_not_depend_on_chunks():
    key, value, query = uneven(800), uneven(800, seed=2), gaussian(1, 4, 800, D, seed=3)
    whole, cut = (fitted(chunks, query, key, value) for chunks in ([800], [5, 300, 211, 284]))
    for side in (0, 1):
        for name, learned in whole.fits[side].items():
            assert torch.equal(learned, cut.fits[side][name]), name
    assert all(not q.numel() for q in cut.queries), "queries are let go once they have been used"


def test_queries_change_the_basis_of_keys_only():
    key, value = uneven(800), uneven(800, seed=2)
    one, other = (fitted([800], gaussian(1, 4, 800, D, seed=3) * s, key, value) for s in (1.0, channel_scales()))
    assert not torch.equal(one.fits[0]["basis"], other.fits[0]["basis"])
    assert torch.equal(one.fits[1]["basis"], other.fits[1]["basis"])


def test_shared_bases_are_stored_once():
    x = uneven(800).expand(3, -1, -1, -1) + 0.1 * gaussian(3, 2, 800, D, seed=8)
    codecs = [CodecSpec.parse("spectral3").build(Geometry(D, side, 2)) for side in (0, 1)]
    histories = [History(*codecs, sinks=4, window=32, shared=shared) for shared in (False, True)]
    for history in histories:
        history.append(x, x, [800] * 3)
        history.code()
    own, shared = (h.fits[0]["basis"].nbytes for h in histories)
    assert own == 3 * shared
    errors = [(h.dense(0) - x).square().mean().item() for h in histories]
    assert errors[1] == pytest.approx(errors[0], rel=0.15)
    histories[1].select(torch.tensor([2, 0]))
    assert torch.isfinite(histories[1].dense(0)).all()


class Turn:
    """A rotary position embedding that turns halves of vectors against each other, once in 6 to 6000 tokens."""

    def apply(self, key, positions):
        half = key.shape[-1] // 2
        angles = positions[:, None, :, None] * 1000.0 ** -(torch.arange(half) / half)
        first, second = key.split(half, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def undo(self, key, positions):
        return self.apply(key, -positions)


@pytest.mark.parametrize(("frame", "gain"), [("page", 3.0), ("token", 5.0)])
def test_frames_follow_keys_that_turn(frame, gain):
    """Late keys whose mean has turned since the fit: a frame that turns with them leaves `gain` times less noise."""
    stationary = uneven(3000) + 2 * gaussian(D, seed=7)
    key = Turn().apply(stationary, torch.arange(3000).unsqueeze(0))
    errors = {}
    for own in ("fixed", frame):
        codecs = [CodecSpec.parse("spectral3").build(Geometry(D, side, 2)) for side in (0, 1)]
        history = History(replace(codecs[0], frame=own), codecs[1], sinks=4, window=32, rotation=Turn())
        history.append(key, key, [3000])
        history.code()
        errors[own] = (history.dense(0) - key)[:, :, 2000:2900].square().mean().item()
    assert errors["fixed"] > gain * errors[frame]


def test_the_default_is_a_preset_away():
    assert CacheSpec.parse("balanced") == CacheSpec()
