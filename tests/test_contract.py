"""What every registered codec promises, whatever it is made of."""

import pytest
import torch

from kvcompress.history import History
from kvcompress.spec import CODECS, CodecSpec
from kvcompress.store import PAGE

SPECS = [CodecSpec(name, bits) for name in CODECS for bits in (CODECS[name].bits or (None,))]

#: Least signal-to-noise ratio in dB on Gaussian vectors of 128: Lloyd-Max's (Max 1960), 0.3 dB less for the estimated
#: gain and mean; for trellis codes what the tables were found to reach; fp8 keeps 3 bits of mantissa (31 dB).
FLOOR = {"exact": 120.0, "fp8": 30.0} | {
    f"lloyd{bits}": floor - 0.3 for bits, floor in enumerate((4.4, 9.3, 14.6, 20.2, 26.0, 31.9, 37.8, 43.7), start=1)
} | {"trellis1": 5.0, "trellis2": 10.7, "trellis3": 16.3, "trellis4": 21.7}  # fmt: skip


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=SPECS, ids=str)
def spec(request):
    return request.param


def coded_history(spec, chunks, x, window=32, sinks=4):
    codec = spec.build(x.shape[-1])
    history = History(codec, codec, sinks, window)
    start = 0
    for length in chunks:
        part = x[:, :, start : start + length]
        history.append(part, part, [part.shape[2]] * len(part))
        history.code()
        start += length
    assert start == x.shape[2]
    return history


def stored(history):
    return history.pool.read(history.table.ids.flatten())


def test_quality(spec):
    x = gaussian(2, 2, 512, 128) + gaussian(128, seed=1)
    codec = spec.build(128)
    fit = codec.fit(x)
    y = codec.restore(codec.decode(codec.encode(x, fit)), fit)
    signal = (x - x.mean(dim=2, keepdim=True)).square().sum() if codec.centred else x.square().sum()
    noise = (y - x).square().sum().clamp_min(1e-12)
    assert 10 * torch.log10(signal / noise).item() >= FLOOR[str(spec)]


@pytest.mark.parametrize("head_dim", [8, 10, 64, 80, 96, 112, 192, 256])
def test_every_head_size(spec, head_dim):
    x = gaussian(1, 2, 128, head_dim)
    codec = spec.build(head_dim)
    fit = codec.fit(x)
    y = codec.restore(codec.decode(codec.encode(x, fit)), fit)
    assert y.shape == x.shape
    # one bit keeps more than half of the energy; least in a trellis stream of 8 bits, shorter than the code's memory
    assert ((y - x).square().sum() / x.square().sum()).item() < (0.6 if head_dim < 16 else 0.4)


@pytest.mark.parametrize("chunks", [[37] * 13, [1] * 481, [300, 1, 180]], ids=["37", "1", "mixed"])
def test_codes_do_not_depend_on_chunk_borders(spec, chunks):
    if chunks[0] == 1 and str(spec) not in ("exact", "trellis3", "lloyd3"):
        pytest.skip("token by token is slow, and the rule is the same for all")
    x = gaussian(1, 2, 481, 16)
    whole, cut = coded_history(spec, [481], x), coded_history(spec, chunks, x)
    assert whole.table.ids.shape[1] == (481 - 4 - 32) // PAGE
    assert whole.coded == cut.coded
    assert all(torch.equal(part, stored(cut)[name]) for name, part in stored(whole).items())


def test_codes_do_not_depend_on_the_other_rows(spec):
    x = gaussian(3, 2, 300, 16)
    together, alone = coded_history(spec, [300], x), coded_history(spec, [300], x[1:2])
    own = together.pool.read(together.table.ids[1])
    assert all(torch.equal(part, own[name]) for name, part in stored(alone).items())


def test_attention_absorbs_what_the_codec_does_linearly(spec):
    x, query = gaussian(1, 2, 128, 80), gaussian(1, 2, 5, 80, seed=2)
    codec = spec.build(80)
    fit = codec.fit(x)
    y = codec.decode(codec.encode(x, fit))
    absorbed, bias = codec.absorb(query, fit)
    scores = absorbed @ y.mT + (0 if bias is None else bias)
    dense = codec.restore(y, fit)
    assert torch.allclose(scores, query @ dense.mT, atol=2e-4)
    weights = scores.softmax(dim=-1)
    assert torch.allclose(codec.restore(weights @ y, fit), weights @ dense, atol=1e-4)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_stored_bytes_are_those_of_the_formula(spec, head_dim):
    history = coded_history(spec, [700], gaussian(2, 2, 700, head_dim))
    elements = sum(history.coded) * 2 * 2 * head_dim
    size = sum(part.untyped_storage().nbytes() for _, part in history.pool.parts())
    assert 8 * size / elements == pytest.approx(history.codecs[0].bits_per_element(torch.float32), rel=1e-6)


def test_nan_stays_in_its_token(spec):
    """A token that is not finite spoils its own reconstruction only; the other tokens' codes do not change."""
    x = gaussian(1, 1, 128, 64)
    codec = spec.build(64)
    fit = codec.fit(x)
    bad = x.clone()
    bad[0, 0, 5, 3] = torch.nan
    good, spoilt = (codec.decode(codec.encode(v, fit)) for v in (x, bad))
    others = torch.arange(128) != 5
    assert torch.equal(good[:, :, others], spoilt[:, :, others])
    assert spoilt[0, 0, 5].isnan().any()
