"""Tables of addresses as kernels read them: every entry is followed to its bytes."""

import copy
import ctypes

import torch

from kvcompress.addresses import SMALLEST, AddressTable
from kvcompress.codecs import Geometry
from kvcompress.history import History
from kvcompress.spec import CodecSpec
from kvcompress.store import PAGE

HEADS, WIDTH, SINKS, WINDOW = 2, 16, 4, 32


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(rows=2, tokens=700, real=None):
    codec = CodecSpec.parse("trellis3").build(Geometry(WIDTH))
    history = History(codec, codec, SINKS, WINDOW)
    feed(history, tokens, real=real, rows=rows)
    return history


def feed(history, tokens, seed=0, real=None, rows=None):
    x = gaussian(rows or len(history.lengths), HEADS, tokens, WIDTH, seed=seed)
    history.append(x, -x, real or [tokens] * len(x))
    history.code()


def bytes_at(address, count):
    return torch.frombuffer(bytearray(ctypes.string_at(address, count)), dtype=torch.uint8)


def assert_true(history, table=None):
    """What the table says is what the pool and the host's page table say, byte by byte."""
    table = table or history.addresses()
    layout = history.pool.layout
    named = history.table.ids >= 0
    assert table.counts.tolist() == list(table.held) == named.sum(dim=1).tolist()
    assert table.addresses.dtype == torch.int64
    assert {own.dtype for own in table.tensors[1:]} == {torch.int32}
    for row, count in enumerate(table.held):
        ids = history.table.ids[row, :count]
        assert table.fills[row, :count].tolist() == history.table.fill[row, :count].tolist()
        before = 0
        for page, address, start, fill in zip(
            ids, *(own[row, :count].tolist() for own in (table.addresses, table.starts, table.fills)), strict=True
        ):
            assert address % 16 == 0
            assert start == SINKS + before
            before += fill
            found = layout.views(bytes_at(address, layout.page_bytes).unsqueeze(0))
            held = history.pool.read(page.unsqueeze(0))
            assert all(torch.equal(found[name], part) for name, part in held.items())
        assert before == history.coded[row]


def test_a_built_table():
    assert_true(filled())
    assert_true(filled(tokens=700, real=[700, 300]))


def test_growth_extends_the_table_in_place():
    history = filled(tokens=400)
    first = history.addresses()
    entries, held = first.addresses[:, : first.held[0]].clone(), first.held
    for step in range(6):
        feed(history, PAGE, seed=step)
        table = history.addresses()
        assert table.addresses.data_ptr() == first.addresses.data_ptr()  # no copy
        assert table.held == tuple(h + step + 1 for h in held)
        assert_true(history)
    assert torch.equal(table.addresses[:, : held[0]], entries)
    assert first.counts.tolist() == list(held)  # the former table stays as it was


def test_rows_grow_apart():
    history = filled(tokens=700, real=[700, 300])
    history.addresses()
    x = gaussian(2, HEADS, 3 * PAGE, WIDTH)
    history.append(x, x, [3 * PAGE] * 2)
    history.code()
    assert history.addresses().held[0] > history.addresses().held[1]
    assert_true(history)


def test_room_doubles():
    history = filled(rows=1, tokens=SINKS + WINDOW + PAGE * SMALLEST)
    assert history.addresses().capacity == SMALLEST == history.addresses().held[0]
    feed(history, PAGE)
    assert history.addresses().capacity == 2 * SMALLEST
    feed(history, 40 * PAGE)  # more than one doubling
    assert history.addresses().capacity == 4 * SMALLEST
    assert_true(history)


def test_crop_select_and_moving():
    history = filled(tokens=700)
    history.addresses()
    history.crop(20)  # exact tokens only: nothing changes
    assert_true(history)
    history.crop(110)
    assert_true(history)
    assert history.addresses().fills[0, history.addresses().held[0] - 1] < PAGE
    feed(history, 200)  # full pages after one that was cut short
    assert_true(history)
    history.select(torch.tensor([1, 1, 0]))
    assert_true(history)
    feed(history, 2 * PAGE)
    assert_true(history)
    history.select(torch.tensor([False, True, True]))
    assert_true(history)
    history.to("cpu")
    assert_true(history)


def test_pages_that_are_used_again():
    history = filled(tokens=700)
    history.addresses()
    history.select(torch.tensor([0]))
    feed(history, 15 * PAGE)  # into the other row's pages, and new ones
    assert_true(history)
    history.crop(history.coded[0])
    feed(history, 700, seed=3)
    assert_true(history)


def test_a_snapshot_keeps_its_table():
    """As a forward pass that is undone: what was appended is forgotten, and written over by what comes instead."""
    history = filled(tokens=400)
    table = history.addresses()
    snapshot = copy.copy(history)
    feed(history, 2 * PAGE, seed=1)
    assert snapshot.addresses() is table
    assert_true(snapshot)
    feed(snapshot, 2 * PAGE, seed=2)
    assert_true(snapshot)


def test_a_history_without_pages():
    history = filled(tokens=20)
    assert history.addresses().held == (0, 0)
    feed(history, 400)
    assert_true(history)


def test_the_table_counts_as_memory():
    history = filled(tokens=400)
    before = len(history.tables())
    table = history.addresses()
    assert [x.data_ptr() for x in history.tables()[before:]] == [x.data_ptr() for x in table.tensors]


def test_a_table_made_in_inference_mode_grows_outside_of_it():
    with torch.inference_mode():
        table = AddressTable.empty(1, torch.device("cpu"))
    one = torch.ones(1, dtype=torch.int64)
    grown = table.append([1], 16 * one, 4 * one, 64 * one)
    assert [own[0, 0].item() for own in grown.tensors[:3]] == [16, 4, 64]
