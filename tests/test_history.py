"""Rows of `sinks | pages | recent`: what moves, what never moves, what is shared."""

import copy

import pytest
import torch

from kvcompress.codecs import Geometry
from kvcompress.history import History
from kvcompress.memory import storage_bytes
from kvcompress.spec import CodecSpec
from kvcompress.store import PAGE, PageTable

HEADS, WIDTH, SINKS, WINDOW = 2, 16, 4, 32


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(name="trellis3", window=WINDOW):
    codec = CodecSpec.parse(name).build(Geometry(WIDTH))
    return History(codec, codec, SINKS, window)


def feed(history, x, real=None):
    history.append(x, -x, real or [x.shape[2]] * len(x))
    history.code()


def filled(rows=2, tokens=700, name="trellis3", seed=0):
    history, x = make(name), gaussian(rows, HEADS, tokens, WIDTH, seed=seed)
    feed(history, x)
    return history, x


def test_parts_of_a_row():
    history, x = filled(tokens=700)
    pages = (700 - SINKS - WINDOW) // PAGE
    assert history.coded == [pages * PAGE] * 2
    assert history.held == [700 - SINKS - pages * PAGE] * 2
    assert WINDOW <= history.held[0] < WINDOW + PAGE
    dense = history.dense(0)
    assert torch.equal(dense[:, :, :SINKS], x[:, :, :SINKS])
    assert torch.equal(dense[:, :, -history.held[0] :], x[:, :, -history.held[0] :])
    coded = slice(SINKS, -history.held[0])
    error = (dense - x)[:, :, coded].square().mean() / x[:, :, coded].square().mean()
    assert 0.01 < error < 0.04  # three bits, 16 dimensions
    error = (history.dense(1) + x)[:, :, coded].square().mean() / x[:, :, coded].square().mean()
    assert 0.01 < error < 0.04


def test_nothing_is_coded_before_the_fit():
    history = make()
    for tokens in range(0, 190, 10):
        feed(history, gaussian(1, HEADS, 10, WIDTH, seed=tokens))
        due = history.lengths[0] >= SINKS + 128 and history.lengths[0] - SINKS >= WINDOW + PAGE
        assert (history.coded[0] > 0) == due


def test_growth_moves_no_page():
    history, _ = filled()
    before = [(part.data_ptr(), part.clone()) for _, part in history.pool.parts()]
    ids, mean = history.table.ids.clone(), history.fits[0]["mean"].clone()
    for step in range(200):
        feed(history, gaussian(2, HEADS, 1, WIDTH, seed=step))
    after = [part for _, part in history.pool.parts()]
    assert len(after) > len(before)
    for (pointer, content), part in zip(before, after, strict=False):
        assert part.data_ptr() == pointer
        assert torch.equal(part, content)
    assert torch.equal(history.table.ids[:, : ids.shape[1]], ids)
    assert torch.equal(history.fits[0]["mean"], mean)  # learned exactly once


def test_left_padding_is_not_stored():
    x = gaussian(2, HEADS, 400, WIDTH)
    padded, alone = make(), make()
    padded.append(x[:, :, :100], -x[:, :, :100], [100, 0])  # a whole chunk of padding
    padded.code()
    feed(padded, x[:, :, 100:], [300, 250])
    feed(alone, x[1:, :, 150:])
    assert padded.lengths == [400, 250]
    assert padded.pads == [0, 150]
    assert padded.columns == 400
    own = padded.pool.read(padded.table.ids[1][padded.table.ids[1] >= 0])
    assert all(torch.equal(part, own[name]) for name, part in alone.pool.read(alone.table.ids[0]).items())
    assert torch.equal(padded.dense(0)[1:, :, 150:], alone.dense(0))
    assert padded.dense(0)[1, :, :150].abs().max() == 0


@pytest.mark.parametrize("tokens", [1, 40, 97, 150, 500, 698, 700])
def test_crop_forgets_the_last_tokens(tokens):
    history, _ = filled()
    before = history.dense(0)
    history.crop(tokens)
    assert history.columns == 700 - tokens
    assert torch.equal(history.dense(0), before[:, :, : 700 - tokens])
    more = gaussian(2, HEADS, 300, WIDTH, seed=9)
    feed(history, more)
    dense = history.dense(0)
    assert torch.equal(dense[:, :, : min(700 - tokens, SINKS)], before[:, :, : min(700 - tokens, SINKS)])
    assert torch.equal(dense[:, :, -WINDOW:], more[:, :, -WINDOW:])
    kept = min(700 - tokens, 700 - 56)  # tokens that were coded before stay as they were coded
    if history.coded[0] and tokens < 500:
        assert torch.equal(dense[:, :, :kept], before[:, :, :kept])


def test_a_row_without_codes_is_fitted_anew():
    history, _ = filled()
    history.crop(696)
    assert history.fit_of == [-1, -1]
    fresh, x = make(), gaussian(2, HEADS, 300, WIDTH, seed=4)
    kept = history.dense(0)
    feed(history, x)
    feed(fresh, torch.cat([kept, x], dim=2))
    assert torch.equal(history.dense(0), fresh.dense(0))


def test_crop_of_too_much_changes_nothing():
    history, _ = filled()
    before = history.dense(0)
    for tokens in (701, -1):
        with pytest.raises(ValueError, match=f"cannot remove {tokens} tokens from a cache of 700"):
            history.crop(tokens)
    assert torch.equal(history.dense(0), before)


def test_rows_share_pages():
    history, x = filled()
    size = storage_bytes(history.pool.slabs)
    history.select(torch.tensor([1, 1, 0, 1]))
    assert storage_bytes(history.pool.slabs) == size
    assert len(history.fits[0]["mean"]) == 2  # fits are shared as well
    dense = history.dense(0)
    assert torch.equal(dense[0], dense[1])
    assert torch.equal(dense[:, :, :SINKS], x[[1, 1, 0, 1], :, :SINKS])
    with pytest.raises(ValueError, match="row 4 is not in a batch of 4"):
        history.select(torch.tensor([4]))


def test_pages_that_no_row_names_are_used_again():
    history, _ = filled()
    allocated = sum(len(part) for name, part in history.pool.parts() if name == "key.0.codes")
    history.select(torch.tensor([0]))
    feed(history, gaussian(1, HEADS, 5 * PAGE, WIDTH))
    assert sum(len(part) for name, part in history.pool.parts() if name == "key.0.codes") == allocated
    feed(history, gaussian(1, HEADS, 10 * PAGE, WIDTH))  # five are left, five are new
    assert sum(len(part) for name, part in history.pool.parts() if name == "key.0.codes") == allocated + 5
    alone = make()
    feed(alone, torch.cat([filled()[1][:1], gaussian(1, HEADS, 5 * PAGE, WIDTH), gaussian(1, HEADS, 640, WIDTH)], 2))
    assert torch.equal(history.dense(0), alone.dense(0))


def test_a_shallow_copy_is_a_snapshot():
    history, _ = filled()
    snapshot, before = copy.copy(history), history.dense(0)
    feed(history, gaussian(2, HEADS, 300, WIDTH, seed=7))
    history.crop(50)
    history.select(torch.tensor([1]))
    assert torch.equal(snapshot.dense(0), before)


def test_rows_that_joined_late_are_fitted_by_themselves():
    """A short row reaches its fit after a long one has: each keeps its own mean."""
    x = gaussian(2, HEADS, 700, WIDTH) + gaussian(2, 1, 1, WIDTH, seed=2) * 5
    together = make()
    for start in range(0, 700, 50):
        part = x[:, :, start : start + 50]
        feed(together, part, [50, 50 if start >= 300 else 0])
    alone = make()
    feed(alone, x[1:, :, 300:])
    assert together.fit_of == [0, 1]
    assert torch.equal(together.dense(0)[1:, :, 300:], alone.dense(0))


def test_moving_to_another_device_keeps_everything():
    history, _ = filled()
    history.to("meta")
    assert {part.device.type for _, part in history.pool.parts()} == {"meta"}
    assert {x.device.type for x in (*history.sink, *history.recent, history.fits[0]["mean"])} == {"meta"}


def test_table_of_rows_of_different_lengths():
    table = PageTable.empty(2).append(torch.tensor([0, 1, 2], dtype=torch.int32), [2, 1])
    assert table.ids.tolist() == [[0, 1], [2, -1]]
    assert table.tokens == [2 * PAGE, PAGE]
    shorter = table.crop([PAGE + 10, 10])
    assert shorter.ids.tolist() == [[0], [2]]
    assert shorter.tokens == [PAGE - 10, PAGE - 10]
    longer = shorter.append(torch.tensor([7], dtype=torch.int32), [0, 1])
    assert longer.ids.tolist() == [[0, -1], [2, 7]]
    assert longer.fill.tolist() == [[PAGE - 10, 0], [PAGE - 10, PAGE]]


def test_rows_may_wait_for_their_fit():
    history, x = make(window=256), gaussian(1, HEADS, 400, WIDTH)
    history.append(x, x, [400])
    history.code(fitted_only=True)
    assert history.coded == [0]
    history.code()
    assert history.coded == [PAGE * 2]
    history.append(x, x, [400])
    history.code(fitted_only=True)
    assert history.coded[0] > PAGE * 2
