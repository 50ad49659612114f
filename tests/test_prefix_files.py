"""A prefix store's folder: files that are not as they should be, processes and threads that use it at once."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path
from threading import Thread

import pytest
import torch

from kvcompress import CompressedCache
from kvcompress.fingerprint import fingerprint
from kvcompress.prefix_index import Cut, Prefix, key_of
from kvcompress.prefixes import PrefixStore
from tests.families import prompt
from tests.prefix_stores import (
    LEAST,
    LENGTH,
    TRELLIS,
    feed,
    files,
    filled,
    look_up,
    model,
    on_disk,
    put,
)


@pytest.fixture
def stored(tmp_path: Path) -> tuple[PrefixStore, Path]:
    store = on_disk(tmp_path)
    put(store, model("llama"), prompt(1, LENGTH))
    return on_disk(tmp_path), files(tmp_path)[0]


def missed(store: PrefixStore) -> bool:
    ids = torch.cat([prompt(1, LENGTH), prompt(1, 10)], dim=1)
    return look_up(store, model("llama"), ids) == (None, 0)


@pytest.mark.parametrize("known", [False, True], ids=["new", "listed"])
def test_damaged_files_are_removed(stored: tuple[PrefixStore, Path], known: bool, caplog: pytest.LogCaptureFixture):
    store, file = stored
    if known:
        assert not missed(store)
    whole = bytearray(file.read_bytes())
    whole[-7] ^= 4
    file.write_bytes(whole)
    with caplog.at_level(logging.WARNING):
        assert missed(store)
    assert not file.exists()
    assert store.stats()["damaged"] == 1
    assert "removed from the prefix store" in caplog.text
    assert "has another checksum than it says" in caplog.text


@pytest.mark.parametrize("size", [0, 7, 300, 20000])
def test_torn_files_are_removed(stored: tuple[PrefixStore, Path], size: int):
    store, file = stored
    file.write_bytes(file.read_bytes()[:size])
    assert missed(store)
    assert not file.exists()
    assert store.stats()["damaged"] == 1


def test_files_of_others_are_left(stored: tuple[PrefixStore, Path], monkeypatch: pytest.MonkeyPatch, caplog):
    """Foreign ones, renamed ones, ones of another version, links and folders."""
    store, file = stored
    foreign = file.with_name("notes.txt")
    foreign.write_text("not ours")
    renamed = file.with_name("0" * 64 + ".kvprefix")
    renamed.write_bytes(file.read_bytes())
    file.with_name("1" * 64 + ".kvprefix").symlink_to(file)
    file.with_name("2" * 64 + ".kvprefix").mkdir()
    monkeypatch.setattr("kvcompress.persist.VERSION", "5")
    with caplog.at_level(logging.WARNING):
        assert missed(store)
        assert missed(store)
    assert len(list(file.parent.iterdir())) == 6
    monkeypatch.undo()
    fresh = on_disk(file.parent)
    with caplog.at_level(logging.WARNING):
        assert not missed(fresh)
    assert len(list(file.parent.iterdir())) == 6
    assert fresh.stats()["damaged"] == store.stats()["damaged"] == 0
    assert [caplog.text.count(said) for said in ("is no stored prefix", "of version '4', this", "its name stands")] == [
        2,
        2,
        1,
    ]


def test_a_file_that_vanishes_is_a_miss(stored: tuple[PrefixStore, Path], monkeypatch: pytest.MonkeyPatch):
    """Between the look-up and the load, by another process's eviction."""
    store, file = stored
    monkeypatch.setattr(store._files, "touch", lambda name: file.unlink())
    assert missed(store)
    assert store.stats()["damaged"] == 0


def test_unfinished_files_of_dead_processes_go_after_a_while(stored: tuple[PrefixStore, Path]):
    _, file = stored
    old, new = (file.with_name(f".{file.name}.{age}.part") for age in ("old", "new"))
    own = file.with_name(".profile.tmp")
    for each in (old, new, own):
        each.write_text("half an entry")
    os.utime(old, (1000, 1000))
    os.utime(own, (1000, 1000))
    on_disk(file.parent)
    assert (old.exists(), new.exists(), own.exists(), file.exists()) == (False, True, True, True)


@pytest.mark.parametrize("error", [OSError("no space left on device"), RuntimeError("can't allocate memory")])
def test_what_cannot_be_written_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception):
    """And the next prompt is none the worse."""

    def full(*_: object) -> None:
        raise error

    store = PrefixStore(tmp_path, min_tokens=LEAST)
    with monkeypatch.context() as broken:
        broken.setattr("kvcompress.persist.save_file", full)
        put(store, model("llama"), prompt(1, LENGTH))
    assert store.stats()["failed"] == 1
    assert list(tmp_path.iterdir()) == [tmp_path / ".lock"]
    put(store, model("llama"), prompt(1, LENGTH, seed=1))
    assert len(files(tmp_path)) == 1


def test_another_version_keeps_no_prompt_from_being_stored(
    stored: tuple[PrefixStore, Path], monkeypatch: pytest.MonkeyPatch
):
    """Nor does a file that this one cannot use: it is written anew."""
    _, file = stored
    monkeypatch.setattr("kvcompress.persist.VERSION", "5")
    later = on_disk(file.parent)
    put(later, model("llama"), prompt(1, LENGTH))
    assert not missed(later)
    assert len(files(file.parent)) == 2  # the other version goes on with its own
    (new,) = set(files(file.parent)) - {file}
    new.write_bytes(file.read_bytes())  # says that it is of version 4
    fresh = on_disk(file.parent)
    assert missed(fresh)
    put(fresh, model("llama"), prompt(1, LENGTH))
    assert not missed(fresh)


@pytest.mark.parametrize(("rows", "length"), [(2, LENGTH), (1, LENGTH - 100)])
def test_an_entry_of_another_cache_is_ignored(rows: int, length: int, tmp_path: Path):
    """Its name, tokens and checksum are right, but what it holds are other rows, or other tokens than it says."""
    own, ids = model("llama"), prompt(1, LENGTH)
    whole = Prefix.of(key_of(fingerprint(own), TRELLIS), ids)
    notes = {"key": whole.key, "cut": Cut.of(filled(own, ids)).to_json()}
    other = filled(own, prompt(rows, LENGTH)[:, :length])
    other.save(tmp_path / f"{whole.name(LENGTH)}.kvprefix", notes, {"ids": whole.ids})
    store = on_disk(tmp_path)
    assert missed(store)
    assert store.stats()["entries: disk"] == 1


def test_power_may_fail_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What an entry holds is on the disk before its name is, and its name before the writer goes on."""
    events: list[tuple[str, int]] = []
    sync, move = os.fsync, os.replace

    def synced(number: int) -> None:
        events.append(("sync", os.fstat(number).st_ino))
        sync(number)

    def moved(old: Path, new: Path) -> None:
        events.append(("move", os.stat(old).st_ino))
        move(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", moved)
    put(on_disk(tmp_path), model("llama"), prompt(1, LENGTH))
    entry, folder = files(tmp_path)[0].stat().st_ino, tmp_path.stat().st_ino
    assert events == [("sync", entry), ("move", entry), ("sync", folder), ("move", entry), ("sync", folder)]


def test_a_folder_that_is_removed_is_an_empty_one(stored: tuple[PrefixStore, Path]):
    store, file = stored
    assert not missed(store)
    shutil.rmtree(file.parent)
    assert missed(store)
    assert store.stats()["entries: disk"] == 0
    put(store, model("llama"), prompt(1, LENGTH))
    assert not missed(store)


def test_an_entry_whose_time_cannot_be_set_is_found(stored: tuple[PrefixStore, Path], monkeypatch: pytest.MonkeyPatch):
    """It is another user's, or the file system has become read-only."""

    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "utime", refused)
    assert not missed(stored[0])


@pytest.mark.parametrize("error", [MemoryError("os error 12"), RuntimeError("unable to mmap 400 bytes: Cannot ...")])
def test_an_entry_that_memory_does_not_hold_is_no_damaged_one(
    stored: tuple[PrefixStore, Path], monkeypatch: pytest.MonkeyPatch, error: Exception
):
    """As safetensors and torch say it where a process has no more room for a mapped file."""

    def full(*_: object, **__: object) -> None:
        raise error

    store, file = stored
    monkeypatch.setattr("kvcompress.persist.safe_open", full)
    assert missed(store)
    assert file.exists()
    assert store.stats()["damaged"] == 0


def test_two_that_write_the_same_prompt_evict_nothing_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The second finds the entry there once it has written its own."""
    own, texts = model("llama"), [prompt(1, LENGTH, seed=seed) for seed in range(2)]
    put(on_disk(tmp_path), own, texts[0])
    budget = 2.5 * files(tmp_path)[0].stat().st_size  # of two entries
    slow, fast = (on_disk(tmp_path, disk_budget=int(budget)) for _ in range(2))
    cache, save = filled(own, texts[1]), CompressedCache.save

    def overtaken(*what: object, **how: object) -> None:
        save(*what, **how)
        monkeypatch.undo()
        put(fast, own, texts[1])

    monkeypatch.setattr(CompressedCache, "save", overtaken)
    slow.put(fingerprint(own), TRELLIS, texts[1], cache)
    slow.flush()
    assert len(files(tmp_path)) == 2
    assert slow.stats()["evictions: disk"] == fast.stats()["evictions: disk"] == 0


def test_threads(tmp_path: Path):
    """Four threads that put and look up at once: every hit is right, and nobody raises."""
    own, store = model("llama"), PrefixStore(tmp_path, min_tokens=LEAST, memory_budget="300kB")
    texts = [prompt(1, LENGTH, seed=seed) for seed in range(4)]
    tail, expected = prompt(1, 5, seed=9), {}
    caches = [filled(own, ids) for ids in texts]
    for seed, ids in enumerate(texts):
        expected[seed] = feed(own, filled(own, ids), tail)
    wrong: list[object] = []

    def work(seed: int) -> None:
        try:
            for turn in range(4):
                at = (seed + turn) % 4
                store.put("m", TRELLIS, texts[at], caches[at].fork())
                cache, tokens = store.lookup("m", TRELLIS, torch.cat([texts[at], tail], dim=1), own.config)
                if cache is not None and not (tokens == LENGTH and torch.equal(feed(own, cache, tail), expected[at])):
                    wrong.append((seed, turn, tokens))
        except Exception as error:
            wrong.append(error)

    threads = [Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    store.flush()
    assert len(files(tmp_path)) == 4
