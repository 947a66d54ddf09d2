"""The kernel's word on changed files (inotify(7)), as far as lumed needs it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import struct
import weakref

# linux/inotify.h. A file that is written in place is told of when it is closed, or, with MODIFY,
# at each write.
IN_MODIFY, IN_CLOSE_WRITE = 0x2, 0x8
IN_MOVED_FROM, IN_MOVED_TO, IN_MOVE_SELF = 0x40, 0x80, 0x800
IN_CREATE, IN_DELETE, IN_DELETE_SELF = 0x100, 0x200, 0x400
IN_Q_OVERFLOW, IN_IGNORED = 0x4000, 0x8000
IN_ONLYDIR, IN_DONT_FOLLOW = 0x1000000, 0x2000000
_EVENT = struct.Struct("iIII")  # wd, mask, cookie, length of the name that follows

_libc = ctypes.CDLL(None, use_errno=True)


class Inotify:
    """One queue of the kernel's. Where it gives none (its limits), nothing is ever told."""

    def __init__(self) -> None:
        self._fd: int = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._close = weakref.finalize(self, _close, self._fd)

    def add(self, path: str, mask: int) -> int:
        """The number of a watch, the same for the same file; negative where there is none."""
        watch: int = _libc.inotify_add_watch(self._fd, os.fsencode(path), mask)
        return watch

    def remove(self, watch: int) -> None:
        """End a watch."""
        _libc.inotify_rm_watch(self._fd, watch)

    def read(self) -> list[tuple[int, int]]:
        """What was told until now: the watch and the mask of each event."""
        found: list[tuple[int, int]] = []
        while events := self._read_some():
            offset = 0
            while offset < len(events):
                watch, mask, _, length = _EVENT.unpack_from(events, offset)
                offset += _EVENT.size + length
                found.append((watch, mask))
        return found

    def _read_some(self) -> bytes:
        try:
            return os.read(self._fd, 1 << 16) if self._fd >= 0 else b""
        except BlockingIOError:
            return b""

    async def wait(self, timeout_s: float) -> bool:
        """Wait until there is something to read; False if nothing came for that long."""
        loop, told = asyncio.get_running_loop(), asyncio.Event()
        if self._fd >= 0:
            loop.add_reader(self._fd, told.set)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await told.wait()
        finally:
            if self._fd >= 0:
                loop.remove_reader(self._fd)
        return told.is_set()

    def close(self) -> None:
        """Give the queue back; done by itself when nobody has it any more."""
        self._close()


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)
