"""The end of a log, and what is written to it from now on, through rotations (tail -F)."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import BinaryIO

from lumed.store.inotify import (
    IN_CREATE,
    IN_DELETE_SELF,
    IN_MODIFY,
    IN_MOVE_SELF,
    IN_MOVED_TO,
    IN_ONLYDIR,
    Inotify,
)

# A guest can write a log of any size.
LONGEST_BYTES = 1024 * 1024
_BLOCK_BYTES = 64 * 1024
# A console comes byte by byte: this much of it at a time costs one look.
_GATHER_S = 0.02
# Where the kernel tells nothing, such as on a network file system.
_LOOK_AGAIN_S = 2.0
_ROTATED = IN_CREATE | IN_MOVED_TO | IN_MOVE_SELF | IN_DELETE_SELF | IN_ONLYDIR


def read_tail(path: Path, lines: int | None, limit_bytes: int = LONGEST_BYTES) -> bytes:
    """The last lines of a file, or all of it; whole lines of its last limit_bytes at most.

    Empty if there is no such file. Reads no more of a long file than it returns, and a block.
    """
    try:
        with path.open("rb") as file:
            return _read_tail(file, lines, limit_bytes)
    except FileNotFoundError:
        return b""


def _read_tail(file: BinaryIO, lines: int | None, limit_bytes: int) -> bytes:
    """As read_tail; the file is left at its end."""
    end = start = file.seek(0, os.SEEK_END)
    data = b""
    while start > 0 and end - start < limit_bytes:
        step = min(_BLOCK_BYTES, start, limit_bytes - (end - start))
        start = file.seek(start - step)
        data = file.read(step) + data
        if lines is not None and data.count(b"\n") > lines:
            break
    file.seek(end)
    if start > 0:
        data = data[data.find(b"\n") + 1 :]
    if lines is not None:
        before, *kept = data.removesuffix(b"\n").rsplit(b"\n", lines)
        if len(kept) == lines:
            data = data[len(before) + 1 :]
    return data


async def follow(path: Path, lines: int | None) -> AsyncGenerator[bytes, None]:
    """What read_tail gives, then what is written; ends when the file's folder is gone.

    A file that takes the name's place is gone on with from its begin; until there is one, it is
    waited for. Nothing is empty.
    """
    follower = await asyncio.to_thread(_Follower, path, lines)
    try:
        while (data := await asyncio.to_thread(follower.read)) is not None:
            if data:
                yield data
            elif await follower.inotify.wait(_LOOK_AGAIN_S):
                await asyncio.sleep(_GATHER_S)
    finally:
        follower.close()


class _Follower:
    """Reads a file as far as it goes. Every method blocks for a moment."""

    def __init__(self, path: Path, lines: int | None) -> None:
        self.inotify = Inotify()
        self._path = path
        self._lines = lines
        self._folder = _identity(path.parent)
        self._file: BinaryIO | None = None
        self._watch = -1
        self._is_first = True
        self.inotify.add(str(path.parent), _ROTATED)

    def read(self) -> bytes | None:
        """What is new, empty if nothing is; None if the folder is gone or another one."""
        # What is told from here on was perhaps not read below.
        self.inotify.read()
        if self._file is None and not self._open():
            return self._find_nothing()
        if self._is_first and self._file is not None:
            self._is_first = False
            if data := _read_tail(self._file, self._lines, LONGEST_BYTES):
                return data
        return self._read_on()

    def _read_on(self) -> bytes | None:
        while self._file is not None:
            status = _identity(self._path)
            if data := self._file.read(_BLOCK_BYTES):
                return data
            here = os.fstat(self._file.fileno())
            if status == (here.st_dev, here.st_ino):
                if here.st_size < self._file.tell():
                    self._file.seek(0)
                    continue
                return b""
            # Replaced before the last bytes of it were read above: there are no more.
            self._let_go()
            self._open()
        return self._find_nothing()

    def _find_nothing(self) -> bytes | None:
        folder = _identity(self._path.parent)
        return b"" if folder is not None and folder == self._folder else None

    def _open(self) -> bool:
        if self._find_nothing() is None:
            # A log that another VM of the name has, since this one was deleted.
            return False
        try:
            self._file = self._path.open("rb", buffering=0)
        except FileNotFoundError:
            # A file that comes later is new to the reader from its first byte on.
            self._is_first = False
            return False
        self._watch = self.inotify.add(str(self._path), IN_MODIFY)
        return True

    def _let_go(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self.inotify.remove(self._watch)

    def close(self) -> None:
        """Close the file and end the watch."""
        self._let_go()
        self.inotify.close()


def _identity(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None
