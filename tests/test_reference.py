"""Attention over a history against plain softmax attention over the same vectors, decoded."""

from dataclasses import dataclass

import pytest
import torch

from kvcompress import reference
from kvcompress.codecs import Band, Codec, Geometry
from kvcompress.codecs.lloyd import LloydMax
from kvcompress.codecs.trellis import Trellis
from kvcompress.history import History
from kvcompress.reference import Mask, Scores, attend
from kvcompress.spec import CodecSpec

SINKS, WINDOW = 4, 32


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(query, key, value, allowed, scores):
    """Softmax attention in float64; allowed bool or additive, broadcastable to [B, heads, Q, T]."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(groups, dim=1) for x in (key, value))
    raw = query.double() @ key.mT * scores.scaling
    if scores.softcap is not None:
        raw = scores.softcap * torch.tanh(raw / scores.softcap)
    raw = raw.masked_fill(~allowed, -torch.inf) if allowed.dtype == torch.bool else raw + allowed
    if scores.sinks is not None:
        sinks = scores.sinks.double().view(1, -1, 1, 1).expand(*raw.shape[:3], 1)
        raw = torch.cat([raw, sinks], dim=-1)
    weights = raw.softmax(dim=-1).nan_to_num()[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2)


@dataclass(frozen=True)
class Principal:
    """A fitted transform, as the next codecs have: the principal axes of a row's first tokens."""

    rank: int

    def fit(self, centred, metric):
        _, axes = torch.linalg.eigh(centred.mT @ centred)
        return {"axes": axes.flip(-1)[..., : self.rank]}

    def analysis(self, fit, device):
        return fit["axes"].mT

    def synthesis(self, fit, device):
        return fit["axes"]


def banded(head_dim):
    """Bands of 8, 3 and no bits over principal axes: what the interface is general for."""
    bands = (Band(16, LloydMax(8)), Band(16, Trellis(3)), Band(head_dim - 32, None))
    return Codec(head_dim, Principal(head_dim), bands, fit_tokens=96)


def codec(name, head_dim):
    return banded(head_dim) if name == "banded" else CodecSpec.parse(name).build(Geometry(head_dim))


def setting(name="trellis3", tokens=1000, chunk=5, rows=2, heads=2, groups=3, width=64, real=None):
    history = History(codec(name, width), codec(name, width), SINKS, WINDOW)
    key, value = gaussian(rows, heads, tokens, width) + 0.5, gaussian(rows, heads, tokens, width, seed=1)
    if tokens:
        history.append(key, value, real or [tokens] * rows)
        history.code()
    own = gaussian(rows, heads, chunk, width, seed=2), gaussian(rows, heads, chunk, width, seed=3)
    return history, gaussian(rows, heads * groups, chunk, width, seed=4), *own


def dense(history, key, value):
    if not history.lengths:
        return key, value
    return torch.cat([history.dense(0), key], dim=2), torch.cat([history.dense(1), value], dim=2)


def causal(history, chunk):
    return torch.ones(chunk, history.columns + chunk, dtype=torch.bool).tril(history.columns)


@pytest.mark.parametrize("name", ["exact", "fp8", "lloyd4", "trellis3", "banded"])
@pytest.mark.parametrize("tokens", [0, 1, 63, 111, 1000])
@pytest.mark.parametrize("chunk", [1, 7])
def test_history_and_chunk(name, tokens, chunk):
    history, query, key, value = setting(name, tokens, chunk)
    assert (sum(history.coded) > 0) == (tokens > 196) or name in ("exact", "fp8", "banded")
    scores = Scores(0.2)
    out = attend(query, history, key, value, Mask(None, True), scores)
    wanted = plain(query, *dense(history, key, value), causal(history, chunk), scores)
    assert out.shape == (2, chunk, 6, 64)
    assert torch.allclose(out.double(), wanted, atol=2e-6)  # float32 rounding over a thousand tokens


def test_the_general_interface_drops_bands_and_fits_rows():
    history, *_ = setting("banded", 1000)
    assert history.fits[0]["axes"].shape == (2, 2, 64, 64)
    bits = (8 * 16 + 16 + 3 * 16 + 16) / 64
    assert history.codecs[0].bits_per_element(torch.float32) == bits
    coded = sum(part.numel() for name, part in history.pool.parts() if name.startswith("key"))
    assert coded * 8 >= bits * sum(history.coded) * 2 * 64 / 2  # float16 gains count two bytes


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("groups", [1, 4, 16])
def test_scores(groups, softcap, sinks):
    history, query, key, value = setting(groups=groups)
    scores = Scores(0.3, softcap, gaussian(2 * groups, seed=8) * 3 if sinks else None)
    out = attend(query, history, key, value, Mask(None, True), scores)
    wanted = plain(query, *dense(history, key, value), causal(history, 5), scores)
    assert torch.allclose(out.double(), wanted, atol=3e-6)


def test_any_mask():
    history, query, key, value = setting()
    holes = gaussian(2, 1, 5, 1005, seed=5) > 0
    heads = gaussian(2, 6, 5, 1005, seed=6) > 0
    bias = gaussian(2, 1, 5, 1005, seed=7)
    vectors, scores = dense(history, key, value), Scores(0.2)
    for mask in (holes, heads, bias, torch.where(holes, 0.0, torch.finfo(torch.float32).min)):
        out = attend(query, history, key, value, Mask(mask, False), scores)
        assert torch.allclose(out.double(), plain(query, *vectors, mask, scores), atol=3e-6)
    real = gaussian(2, 1005, seed=9) > -1
    out = attend(query, history, key, value, Mask(real, True), scores)
    allowed = real[:, None, None] & causal(history, 5)
    assert torch.allclose(out.double(), plain(query, *vectors, allowed, scores), atol=3e-6)


def test_left_padding_of_rows():
    history, query, key, value = setting(real=[1000, 620])
    assert history.pads == [0, 380]
    real = torch.ones(2, 1005, dtype=torch.bool)
    real[1, :380] = False
    scores = Scores(0.2)
    wanted = plain(query, *dense(history, key, value), real[:, None, None] & causal(history, 5), scores)
    for mask in (Mask(None, True), Mask(real, True), Mask(real[:, None, None] & causal(history, 5), False)):
        assert torch.allclose(attend(query, history, key, value, mask, scores).double(), wanted, atol=3e-6)


def test_who_sees_nothing_gets_zero():
    history, query, key, value = setting()
    mask = torch.ones(2, 1, 5, 1005, dtype=torch.bool)
    mask[1, :, 2] = False
    out = attend(query, history, key, value, Mask(mask, False), Scores(0.2))
    assert out[1, 2].abs().max() == 0
    assert out.isfinite().all()


def test_a_small_workspace_changes_nothing(monkeypatch):
    history, query, key, value = setting(chunk=50)
    whole = attend(query, history, key, value, Mask(None, True), Scores(0.2))
    monkeypatch.setattr(reference, "WORKSPACE", 1)
    monkeypatch.setattr(reference, "TILE", 8)
    pieces = attend(query, history, key, value, Mask(None, True), Scores(0.2))
    assert torch.allclose(pieces, whole, atol=2e-6)


def test_after_a_crop_inside_a_page():
    history, query, key, value = setting()
    history.crop(100)
    scores = Scores(0.2)
    out = attend(query, history, key, value, Mask(None, True), scores)
    wanted = plain(query, *dense(history, key, value), causal(history, 5), scores)
    assert torch.allclose(out.double(), wanted, atol=2e-6)


def test_plain_attention_over_a_whole_cache():
    """Without a history: queries stand at the end of the keys, as in a stock cache."""
    query, key, value = gaussian(2, 6, 5, 32), gaussian(2, 2, 90, 32, seed=1), gaussian(2, 2, 90, 32, seed=2)
    scores = Scores(0.2)
    out = attend(query, None, key, value, Mask(None, True), scores)
    wanted = plain(query, key, value, torch.ones(5, 90, dtype=torch.bool).tril(85), scores)
    assert torch.allclose(out.double(), wanted, atol=2e-6)
    out = attend(query, None, key, value, Mask(None, False), scores)
    assert torch.allclose(out.double(), plain(query, key, value, torch.ones(5, 90).bool(), scores), atol=2e-6)


def test_half_precision_within_the_tolerance_of_every_backend():
    """max |out - ref| <= 2 max |ref in the low precision - ref in float32| + atol (design, invariant 5)."""
    history, query, key, value = setting("exact")
    scores = Scores(0.2)
    wanted = plain(query, *dense(history, key, value), causal(history, 5), scores)
    low = plain(*(x.bfloat16() for x in (query, *dense(history, key, value))), causal(history, 5), scores).bfloat16()
    out = attend(query.bfloat16(), history, key, value, Mask(None, True), scores)
    assert out.dtype == torch.bfloat16
    assert (out.double() - wanted).abs().max() <= 2 * (low.double() - wanted).abs().max() + 1e-6
