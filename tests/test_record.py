"""Records of pages: where their parts lie, and that nothing is lost or left out of account."""

import pytest
import torch

from kvcompress.record import Field, RecordLayout
from kvcompress.store import PAGE, PagePool


def pages(count, seed=0):
    """Parts whose sizes leave gaps: 7 bytes, 2 x 3 float32, 5 float16, 16 bytes, not in the order of names."""
    make = torch.Generator().manual_seed(seed)
    return {
        "key.0.codes": torch.randint(0, 256, (count, 7), generator=make).to(torch.uint8),
        "key.0.scale": torch.randn(count, 2, 3, generator=make),
        "value.0.gain": torch.randn(count, 1, 5, generator=make).half(),
        "value.0.codes": torch.randint(0, 256, (count, 2, 8), generator=make).to(torch.uint8),
    }


def test_parts_lie_at_multiples_of_sixteen_bytes():
    layout = RecordLayout.of(pages(3))
    assert layout.fields == (
        Field("key.0.codes", 0, torch.uint8, (7,)),
        Field("key.0.scale", 16, torch.float32, (2, 3)),
        Field("value.0.codes", 48, torch.uint8, (2, 8)),
        Field("value.0.gain", 64, torch.float16, (1, 5)),
    )
    assert layout.page_bytes == 80
    assert layout.shares() == {"key.0.codes": 16, "key.0.scale": 32, "value.0.gain": 16, "value.0.codes": 16}


def test_the_order_in_which_parts_come_does_not_matter():
    """A saved cache's come in another."""
    coded = pages(2)
    other = dict(reversed(coded.items()))
    assert RecordLayout.of(other) == RecordLayout.of(coded)
    assert torch.equal(RecordLayout.of(coded).records(other), RecordLayout.of(coded).records(coded))


def test_records_give_back_their_parts_as_views():
    coded = pages(3)
    layout = RecordLayout.of(coded)
    records = layout.records(coded)
    assert records.shape == (3, 80)
    views = layout.views(records)
    for name, part in coded.items():
        assert torch.equal(views[name], part)
        assert views[name].dtype == part.dtype
        assert views[name].untyped_storage().data_ptr() == records.untyped_storage().data_ptr()
    assert bytes(records[1, 16:40].tolist()) == coded["key.0.scale"][1].numpy().tobytes()
    assert records[:, 7:16].count_nonzero() == 0  # between the parts


def test_all_bytes_of_the_slabs_are_accounted_for():
    pool = PagePool()
    for count in (1, 4, 2):
        pool.write(pages(count))
    size = sum(slab.untyped_storage().nbytes() for slab in pool.slabs)
    assert size == 7 * 80
    assert sum(pool.stored_bytes().values()) == size
    assert pool.stored_bytes()["key.0.scale"] == 7 * 32
    pool.collect(torch.tensor([[1, 2, -1]], dtype=torch.int32))  # the first and the last slab go
    assert sum(pool.stored_bytes().values()) == 4 * 80


def test_pages_of_another_layout_are_refused():
    pool = PagePool()
    pool.write(pages(2))
    other = pages(2) | {"key.0.scale": torch.zeros(2, 2, 3).half()}
    with pytest.raises(ValueError, match=r"key.0.scale \[2, 3\] of torch.float32.* got .*\[2, 3\] of torch.float16"):
        pool.write(other)
    assert torch.equal(pool.read(torch.tensor([1]))["key.0.scale"], pages(2)["key.0.scale"][1:])


def test_nothing_can_be_read_before_the_first_write():
    pool = PagePool()
    with pytest.raises(ValueError, match="no pages have been written"):
        pool.read(torch.tensor([0]))
    assert pool.stored_bytes() == {}
    assert list(pool.parts()) == []


def test_pool_reads_across_slabs_and_out_of_order():
    pool = PagePool()
    ids = torch.cat([pool.write({"codes": torch.full((n, 1, PAGE, 2), float(i))}) for i, n in enumerate((2, 1, 3))])
    assert ids.tolist() == [0, 1, 2, 3, 4, 5]
    read = pool.read(torch.tensor([5, 0, 2, 1, 3]))["codes"][:, 0, 0, 0]
    assert read.tolist() == [2.0, 0.0, 1.0, 0.0, 2.0]
    view = pool.read(torch.tensor([3, 4]))["codes"]
    assert view.untyped_storage().data_ptr() == pool.slabs[2].untyped_storage().data_ptr()
