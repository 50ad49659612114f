"""What every registered codec promises, whatever it is made of."""

import pytest
import torch
from transformers import LlamaConfig

from kvcompress import CacheSpec, CompressedCache
from kvcompress.codecs import Geometry
from kvcompress.history import History
from kvcompress.reference import Scores
from kvcompress.spec import CODECS, CodecSpec
from kvcompress.store import PAGE

SPECS = [(text, side) for name in CODECS for text in CODECS[name].examples for side in (0, 1)]

#: Least signal-to-noise ratio in dB on Gaussian vectors of 128, by spec (of keys and of values, or of both alike).
#: Lloyd-Max's (Max 1960), 0.3 dB less for the estimated gain and mean; for trellis codes what the tables were found to
#: reach; fp8 keeps 3 bits of mantissa (31 dB). White vectors gain nothing from bands of unequal bits: a spectral codec
#: has the mean of its bands' noise. Round-to-nearest on an even grid from the least to the greatest of n Gaussians has
#: E[range^2] / 12 (2^bits - 1)^2, E[range^2] = 17.6, 22.4, 27.3 for n = 32, 64, 128; 3 dB more where every channel has
#: its own zero, since a mean as large as the deviation then counts as signal only. kvquant: Lloyd-Max's, and these 3 dB
#: for keys. nf4 and bnb8: relative errors of 0.092 and 0.011. White vectors lose what low rank drops, nothing more than
#: the share of the 128 dimensions (256, jointly) that it is; a residual takes a little off its codec's noise; two heads
#: have the mean of their noise.
FLOOR: dict[str, float | tuple[float, float]] = {"exact": 120.0, "fp8": 30.0} | {
    f"lloyd{bits}": floor - 0.3 for bits, floor in enumerate((4.4, 9.3, 14.6, 20.2, 26.0, 31.9, 37.8, 43.7), start=1)
} | {"trellis1": 5.0, "trellis2": 10.7, "trellis3": 16.3, "trellis4": 21.7, "prerope+trellis3": 16.3} | {
    "spectral1.5": 4.0, "spectral2": 9.0, "spectral2.5": 10.0, "spectral3": 13.0, "spectral3.5": 15.0, "spectral4": 18.0
} | {
    f"turboquant{bits}": floor - 0.3 for bits, floor in enumerate((4.4, 9.3, 14.6, 20.2), start=1)
} | {
    "kivi2": (10.8, 7.8), "kivi3": (18.1, 15.2), "kivi4": (24.8, 21.8), "kivi8": (49.4, 46.4),
    "kvarn2": (9.8, 5.9), "kvarn3": (17.1, 13.3), "kvarn4": (23.7, 19.9),
} | {
    f"kvquant{bits}": (floor + 3.0, floor) for bits, floor in enumerate((9.3, 14.6, 20.2), start=2)
} | {
    "nf4": 20.5, "bnb8": 38.9,
} | {
    "lowrank32": 1.25, "lowrank32+trellis4": 1.2, "lowrank64": 3.0, "jointrank64": 1.25, "jointrank64+trellis4": 1.2,
    "residual8+trellis2": 10.9, "residual4+kivi2": (10.9, 7.9), "trellis4/trellis3": 18.2,
}  # fmt: skip


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Turn:
    """A rotary position embedding for tests: halves of vectors are turned against each other, D even."""

    def apply(self, key, positions):
        half = key.shape[-1] // 2
        angles = positions[:, None, :, None] * 100.0 ** -(torch.arange(half) / half)
        first, second = key.split(half, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def undo(self, key, positions):
        return self.apply(key, -positions)


OPTIONAL = {"nf4": "bitsandbytes", "bnb8": "bitsandbytes"}  # packages that a codec's tests are skipped without


@pytest.fixture(params=SPECS, ids=lambda spec: f"{spec[0]}-{('key', 'value')[spec[1]]}")
def make(request):
    """make(head_dim, heads) builds the codec; the test is skipped where the codec says that it takes no such size."""
    text, side = request.param
    if text in OPTIONAL:
        pytest.importorskip(OPTIONAL[text])

    def build(head_dim, heads=2):
        try:
            return CodecSpec.parse(text).build(Geometry(head_dim, side, heads))
        except ValueError as error:
            if str(head_dim) not in str(error):  # a refusal names what was given
                raise
            pytest.skip(str(error))

    build.text, build.side = text, side
    return build


def coded_history(make, chunks, x, window=32, sinks=4):
    """x is fed as keys and values, one of which the codec is for."""
    codec = make(x.shape[-1], x.shape[1])
    other = CodecSpec.parse("exact").build(Geometry(x.shape[-1]))
    pair = (other, codec) if make.side else (codec, other)
    history = History(*pair, sinks, window, rotation=Turn())
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


def round_trip(codec, x):
    fit = codec.fit(x)
    return codec.restore(codec.decode(codec.encode(x, fit), fit), fit)


def test_quality(make):
    x = gaussian(2, 2, 512, 128) + gaussian(128, seed=1)
    codec = make(128)
    y = round_trip(codec, x)
    signal = (x - x.mean(dim=2, keepdim=True)).square().sum() if codec.centred else x.square().sum()
    noise = (y - x).square().sum().clamp_min(1e-12)
    floor = FLOOR[make.text]
    assert 10 * torch.log10(signal / noise).item() >= (floor if isinstance(floor, float) else floor[make.side])


@pytest.mark.parametrize("head_dim", [8, 10, 64, 80, 96, 112, 192, 256])
def test_every_head_size(make, head_dim):
    x = gaussian(1, 2, 128, head_dim)
    codec = make(head_dim)
    y = round_trip(codec, x)
    assert y.shape == x.shape
    # one bit keeps more than half of the energy; least in a trellis stream of 8 bits, shorter than the code's memory
    bound = 0.6 if head_dim < 16 else 0.4
    if "rank" in make.text:  # the strongest directions hold more than their share of it
        share = codec.rank / (x.shape[1] * head_dim if "joint" in make.text else head_dim)
        bound = 1 - (1 - bound) * min(share, 1)
    assert ((y - x).square().sum() / x.square().sum()).item() < bound


def small(make):
    """A head size that the codec takes, small where it can be."""
    try:
        make(16)
    except pytest.skip.Exception:
        return 64
    return 16


@pytest.mark.parametrize("chunks", [[37] * 21, [1] * 777, [600, 1, 176]], ids=["37", "1", "mixed"])
def test_codes_do_not_depend_on_chunk_borders(make, chunks):
    if chunks[0] == 1 and make.text not in ("exact", "trellis3", "spectral3"):
        pytest.skip("token by token is slow, and the rule is the same for all")
    x = gaussian(1, 2, 777, small(make))
    whole, cut = coded_history(make, [777], x), coded_history(make, chunks, x)
    assert whole.table.ids.shape[1] == (777 - 4 - 32) // PAGE
    assert whole.coded == cut.coded
    assert all(torch.equal(part, stored(cut)[name]) for name, part in stored(whole).items())


def test_codes_do_not_depend_on_the_other_rows(make):
    x = gaussian(3, 2, 600, small(make))
    together, alone = coded_history(make, [600], x), coded_history(make, [600], x[1:2])
    assert alone.coded[0] > 0
    own = together.pool.read(together.table.ids[1])
    assert all(torch.equal(part, own[name]) for name, part in stored(alone).items())


def test_attention_absorbs_what_the_codec_does_linearly(make):
    width = 80 if make.text in ("trellis3", "exact") else 64
    x, query = gaussian(1, 2, 128, width), gaussian(1, 2, 5, width, seed=2)
    codec = make(width)
    fit = codec.fit(x)
    y = codec.decode(codec.encode(x, fit), fit)
    absorbed, bias = codec.absorb(query, fit)
    scores = absorbed @ y.mT + (0 if bias is None else bias)
    dense = codec.restore(y, fit)
    assert torch.allclose(scores, query @ dense.mT, atol=5e-4)
    weights = scores.softmax(dim=-1)
    assert torch.allclose(codec.restore(weights @ y, fit), weights @ dense, atol=1e-4)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_stored_bytes_are_those_of_the_formula(make, head_dim):
    history = coded_history(make, [700], gaussian(2, 2, 700, head_dim))
    side = ("key", "value")[make.side]
    size = sum(size for name, size in history.pool.stored_bytes().items() if name.startswith(side))
    bits = 8 * size / (sum(history.coded) * 2 * head_dim)
    assert bits == pytest.approx(history.codecs[make.side].bits_per_element(torch.float32), rel=1e-6)


def test_nan_stays_in_its_token(make):
    """A token that is not finite spoils its own reconstruction only; the other tokens' codes do not change."""
    x = gaussian(1, 2, 128, 64)
    codec = make(64)
    if codec.page_wise:
        pytest.skip("tokens of a page share scales")
    fit = codec.fit(x)
    bad = x.clone()
    bad[0, 0, 5, 3] = torch.nan
    good, spoilt = (codec.decode(codec.encode(v, fit), fit) for v in (x, bad))
    others = torch.arange(128) != 5
    assert torch.equal(good[:, :, others], spoilt[:, :, others])
    assert spoilt[0, 0, 5].isnan().any()


def test_crop_cuts_codes_short(make):
    x = gaussian(1, 2, 777, small(make))
    whole, cropped = coded_history(make, [777], x), coded_history(make, [777], x)
    cropped.crop(100)  # 32 + 37 exact tokens, then 31 coded ones
    kept = whole.columns - 100
    for side in (0, 1):
        expected = whole.dense(side)[:, :, :kept]
        assert torch.allclose(cropped.dense(side), expected, atol=1e-5)
    assert cropped.columns == kept


def test_beams_share_pages(make):
    x = gaussian(2, 2, 640, small(make))
    history = coded_history(make, [640], x)
    before, size = history.dense(make.side), sum(part.nbytes for _, part in history.pool.parts())
    history.select(torch.tensor([1, 1, 0]))
    assert sum(part.nbytes for _, part in history.pool.parts()) == size
    assert torch.allclose(history.dense(make.side), before[[1, 1, 0]], atol=1e-5)


def test_a_saved_cache_goes_on_as_the_original(make, tmp_path):
    """Saved before the codec is fitted and again after it: the same attention and, in the end, the same codes."""
    width = small(make)
    config = LlamaConfig(
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=width, hidden_size=4 * width,
        attn_implementation="kvcompress",
    )  # fmt: skip
    pair = ("exact", make.text) if make.side else (make.text, "exact")
    metric = torch.eye(width).expand(2, -1, -1)  # of errors of values
    lengths = (100, 480, 10, 120)  # spectral codecs are fitted in the second chunk
    x, query = gaussian(2, 2, sum(lengths), width), gaussian(2, 4, sum(lengths), width, seed=2)
    original, start = CompressedCache(config, CacheSpec(*pair, sinks=4, window=32)), 0
    saved = original
    for length in lengths:
        saved.save(tmp_path / "cache")
        saved = CompressedCache.load(tmp_path / "cache", config)
        chunk = slice(start, start := start + length)
        outputs = []
        for cache in (original, saved):
            cache.update(x[:, :, chunk], x[:, :, chunk].flip(2), 0)
            outputs.append(cache.layers[0].attend(query[:, :, chunk], None, Scores(width**-0.5), lambda *_: metric))
        assert torch.equal(*outputs)
    mine, yours = (cache.layers[0].history for cache in (original, saved))
    assert mine.coded == yours.coded == [(sum(lengths) - 4 - 32) // PAGE * PAGE] * 2
    assert all(torch.equal(part, stored(yours)[name]) for name, part in stored(mine).items())
    assert all(torch.equal(mine.dense(side), yours.dense(side)) for side in (0, 1))
    assert saved.memory().total <= original.memory().total
