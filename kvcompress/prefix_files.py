"""Compressed prefixes in a folder that several processes read and write at once.

    NAME.kvprefix       an entry: a saved cache (kvcompress/persist.py), its tokens and how it can be cut in the notes;
                        NAME is the hash of the weights, the spec and the tokens; its mtime is when it was last used
    .lock               held while entries are moved in, evicted or removed
    .*.tmp, .*.part     entries being written; older than STALE they are some dead process's, and removed

There is no index to be torn: what entries there are is what the folder lists, and each says itself what it is. An entry
is whole or not there; what is damaged all the same (a checksum does not fit) is removed, what is another's is left. A
folder that somebody removes is an empty one, which the next entry makes again.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from filelock import FileLock
from transformers import PreTrainedConfig

from kvcompress import persist
from kvcompress.cache import CompressedCache
from kvcompress.memory import format_bytes
from kvcompress.persist import DamagedError
from kvcompress.prefix_index import Cut, Index, Prefix

logger = logging.getLogger(__name__)

SUFFIX = ".kvprefix"
OURS = re.compile(rf"[0-9a-f]{{64}}{re.escape(SUFFIX)}")
UNFINISHED = re.compile(rf"\..*{re.escape(SUFFIX)}.*\.(tmp|part)")
STALE = 600  # seconds since anything was written to an unfinished file


class PrefixFiles:
    """The entries of a folder, held to `budget` bytes. One thread at a time may use it, and another one `put`.

    index: of the entries that were there at the last `scan`. evictions, damaged: entries that this process removed for
    lack of room, and since they were not as they had been written.
    """

    def __init__(self, folder: Path, budget: int):
        self.folder, self.budget = folder, budget
        folder.mkdir(parents=True, exist_ok=True)
        self.index = Index()
        self.evictions = self.damaged = 0
        self._ignored: dict[str, int] = {}  # names, and the files' inodes
        self._lock = FileLock(folder / ".lock")
        self._drop_unfinished()
        with self._lock:
            self._evict(0)

    def scan(self) -> None:
        """Bring the index up to what the folder holds; files that are new are asked what they are."""
        found = {entry.name: entry.inode() for entry in self._files()}
        for name in self.index.names():
            if name + SUFFIX not in found:
                self.index.remove(name)
        for file, inode in found.items():
            if file.removesuffix(SUFFIX) not in self.index and self._ignored.get(file) != inode:
                self._ask(file, inode)

    def _files(self) -> Iterator[os.DirEntry[str]]:
        """Plain files that are no hidden ones; none where the folder is gone."""
        try:
            entries = os.scandir(self.folder)
        except FileNotFoundError:
            return
        with entries:
            yield from (e for e in entries if not e.name.startswith(".") and e.is_file(follow_symlinks=False))

    def _ask(self, file: str, inode: int) -> None:
        """List a file in the index, or ignore it from now on."""
        path = self.folder / file
        try:
            if not OURS.fullmatch(file):
                raise ValueError(f"{str(path)!r} is no stored prefix")
            prompt, cut = _read(path)
            self.index.add(file.removesuffix(SUFFIX), prompt.blocks, cut)
        except FileNotFoundError:
            return  # evicted meanwhile
        except DamagedError as error:
            self._drop_damaged(path, inode, error)
        except (OSError, ValueError) as error:
            self._ignore(file, inode, error)

    def load(self, name: str, config: PreTrainedConfig) -> tuple[CompressedCache, Prefix] | None:
        """An entry of the index on the CPU, verified, and its prompt; None where it is gone, damaged or of no use."""
        path, inode = self.folder / (name + SUFFIX), -1
        try:
            inode = path.stat().st_ino
            cache = CompressedCache.load(path, config, "cpu")
            prompt, cut = _read(path)
            if Cut.of(cache) != cut:
                raise ValueError(f"{str(path)!r} does not hold a cache of the prompt that it says it is of")
        except (OSError, ValueError) as error:
            self.index.remove(name)
            if isinstance(error, DamagedError):
                self._drop_damaged(path, inode, error)
            elif not isinstance(error, FileNotFoundError):
                self._ignore(path.name, inode, error)
            return None
        return cache, prompt

    def touch(self, name: str) -> None:
        """An entry was used just now, as far as that can be written down: it only decides what is evicted first."""
        with suppress(OSError):  # held in memory and no longer here, another user's, on a file system to be read only
            os.utime(self.folder / (name + SUFFIX))

    def put(self, name: str, cache: CompressedCache, prompt: Prefix, cut: Cut) -> None:
        """Write an entry, and evict others to keep the budget. Raises OSError or SafetensorError where it cannot be."""
        path = self.folder / (name + SUFFIX)
        if self._usable(path):
            self.touch(name)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._drop_unfinished()
        staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        try:
            notes = {"key": prompt.key, "cut": cut.to_json()}
            cache.save(staged, notes, {"ids": prompt.ids})
            size = staged.stat().st_size
            if size > self.budget:
                logger.warning(
                    "a prefix of %d tokens takes %s, more than all that %s may hold (%s): it is not kept there",
                    len(prompt.ids), format_bytes(size), self.folder, format_bytes(self.budget),
                )  # fmt: skip
                return
            with self._lock:
                if self._usable(path):  # another process was faster: no other entry has to go
                    self.touch(name)
                    return
                self._evict(size)
                os.replace(staged, path)
            persist.sync_folder(self.folder)
        finally:
            staged.unlink(missing_ok=True)

    def _usable(self, path: Path) -> bool:
        """Whether an entry is there, and none that this process has to ignore."""
        try:
            return self._ignored.get(path.name) != path.stat().st_ino
        except FileNotFoundError:
            return False

    def sizes(self) -> dict[str, int]:
        """Bytes of the files that count against the budget, by name: all that are ours, of any version or model."""
        found = {}
        for entry in self._files():
            if OURS.fullmatch(entry.name):
                try:
                    found[entry.name] = entry.stat().st_size
                except FileNotFoundError:
                    continue
        return found

    def _evict(self, room: int) -> None:
        """Remove entries, the longest unused first, until `room` bytes more are within the budget."""
        sizes, used = self.sizes(), {}
        for file in sizes:
            try:
                used[file] = (self.folder / file).stat().st_mtime_ns
            except FileNotFoundError:
                continue
        total = sum(sizes[file] for file in used)
        for file in sorted(used, key=used.__getitem__):
            if total + room <= self.budget:
                return
            (self.folder / file).unlink(missing_ok=True)
            total -= sizes[file]
            self.evictions += 1

    def _drop_unfinished(self) -> None:
        for entry in os.scandir(self.folder):
            try:
                if UNFINISHED.fullmatch(entry.name) and time.time() - entry.stat().st_mtime > STALE:
                    os.unlink(entry.path)
            except FileNotFoundError:
                continue  # finished or removed meanwhile

    def _drop_damaged(self, path: Path, inode: int, error: Exception) -> None:
        """Remove a file that was damaged, unless another has come to its place; one that must not be is ignored."""
        try:
            with self._lock:
                if path.exists() and path.stat().st_ino == inode:
                    path.unlink()
                    self.damaged += 1
                    logger.warning("removed from the prefix store: %s", error)
        except OSError:
            self._ignore(path.name, inode, error)

    def _ignore(self, file: str, inode: int, error: Exception) -> None:
        self._ignored[file] = inode
        logger.warning("ignored in the prefix store: %s", error)


def _read(path: Path) -> tuple[Prefix, Cut]:
    """The prompt that an entry is of and how it can be cut; raises ValueError where its name says something else."""
    notes, tensors = persist.read_notes(path)
    key, ids = notes.get("key"), tensors.get("ids")
    if not isinstance(key, str) or ids is None:
        raise ValueError(f"{str(path)!r} does not say what prompt it is of")
    prompt, cut = Prefix.of(key, ids), Cut.from_json(notes.get("cut"))
    if cut.tokens != len(prompt.ids) or prompt.name(cut.tokens) + SUFFIX != path.name:
        raise ValueError(f"{str(path)!r} does not hold the tokens that its name stands for")
    return prompt, cut
