"""The file that pages go to when memory does not hold them: bytes at offsets, in an unnamed temporary file.

The file has no name from the start (on Windows: is deleted when it is closed), so nothing is left of it when its owner
is gone, not even after a crash. It is read and written by calls, not mapped: a full disk, or a file that cannot be read
any longer, is an error that a caller can catch, where a mapped file ends the process.
"""

from __future__ import annotations

import tempfile
import threading
import weakref
from bisect import insort
from pathlib import Path

from torch import Tensor


class SpillFile:
    """An empty file in `folder` (None: the system's for temporary files). Raises OSError where it cannot be made."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        try:
            file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  (closed with its owner)
        except OSError as error:
            raise OSError(
                error.errno,
                f"pages cannot be offloaded to the folder {str(folder or tempfile.gettempdir())!r}: {error}",
            ) from error
        self._file = file
        weakref.finalize(self, file.close)
        self._lock = threading.Lock()  # of the file's position
        self._holes: list[tuple[int, int]] = []  # (offset, bytes) below the end that hold nothing, in order, apart
        self.size = 0

    def write(self, data: Tensor) -> int:
        """Store contiguous bytes (uint8, on the CPU) somewhere; returns their offset.

        Raises OSError, with the file as it was, where they cannot be written.
        """
        offset = self._allocate(data.nbytes)
        view, done = data.view(-1).numpy().data, 0
        try:
            with self._lock:
                self._file.seek(offset)
                while done < len(view):
                    done += self._file.write(view[done:])
        except OSError as error:
            self.free(offset, data.nbytes)
            folder = str(self.folder or tempfile.gettempdir())
            raise OSError(
                error.errno,
                f"{data.nbytes} bytes of pages cannot be moved to a file in {folder!r}: {error}; "
                "what was held is unharmed",
            ) from error
        return offset

    def read(self, offset: int, out: Tensor) -> None:
        """Fill `out` (uint8, contiguous, on the CPU) with what is stored at an offset; raises OSError where it ends."""
        view, done = out.view(-1).numpy().data, 0
        with self._lock:
            self._file.seek(offset)
            while done < len(view):
                count = self._file.readinto(view[done:])
                if not count:
                    raise OSError(f"the file of offloaded pages ends at byte {offset + done}: somebody cut it short")
                done += count

    def free(self, offset: int, count: int) -> None:
        """Let go of `count` bytes that were stored at an offset; at its end the file becomes shorter."""
        if self._file.closed:  # the garbage collector ends things that name each other in any order
            return
        insort(self._holes, (offset, count))
        joined: list[tuple[int, int]] = []
        for start, length in self._holes:
            if joined and sum(joined[-1]) == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            else:
                joined.append((start, length))
        if sum(joined[-1]) == self.size:
            self.size, _ = joined.pop()
            self._file.truncate(self.size)
        self._holes = joined

    def _allocate(self, count: int) -> int:
        for index, (offset, length) in enumerate(self._holes):
            if length >= count:
                rest = [(offset + count, length - count)] if length > count else []
                self._holes[index : index + 1] = rest
                return offset
        self.size += count
        return self.size - count
