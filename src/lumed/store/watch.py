"""The kernel's word on which folders have changed, so that the others need no look (inotify(7)).

A list of 2,000 VMs asked the kernel 8,000 questions, 31 ms, and the answer is nearly always that
nothing changed. What was changed before a list began is always seen by it: the kernel queues an
event before the change returns. Nothing here waits or wakes anybody; events are read when asked.
"""

from __future__ import annotations

import ctypes
import os
import struct
import weakref

# linux/inotify.h. A file that is written in place is told of when it is closed.
_IN_CLOSE_WRITE = 0x8
_IN_MOVED_FROM, _IN_MOVED_TO, _IN_MOVE_SELF = 0x40, 0x80, 0x800
_IN_CREATE, _IN_DELETE, _IN_DELETE_SELF = 0x100, 0x200, 0x400
_IN_Q_OVERFLOW, _IN_IGNORED = 0x4000, 0x8000
_IN_ONLYDIR, _IN_DONT_FOLLOW = 0x1000000, 0x2000000
_GONE = _IN_MOVE_SELF | _IN_DELETE_SELF | _IN_IGNORED
_CHANGES = _IN_CLOSE_WRITE | _IN_MOVED_FROM | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE
_CHANGES |= _IN_MOVE_SELF | _IN_DELETE_SELF
_EVENT = struct.Struct("iIII")  # wd, mask, cookie, length of the name that follows

_libc = ctypes.CDLL(None, use_errno=True)


class FolderWatch:
    """Which of the added folders were left alone since; not for use by two threads at once.

    Where the kernel gives no watch (its limits, file systems without), a folder never counts as
    left alone. Changes by other machines, on a network file system, are not told of.
    """

    def __init__(self) -> None:
        self._watches: dict[int, str] = {}
        self._untouched: set[str] = set()
        self._fd: int = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd >= 0:
            weakref.finalize(self, os.close, self._fd)

    def add(self, folder: str) -> None:
        """Count the folder as untouched from now on, until a name or a file in it changes."""
        mask = _CHANGES | _IN_ONLYDIR | _IN_DONT_FOLLOW
        watch: int = _libc.inotify_add_watch(self._fd, os.fsencode(folder), mask)
        if watch < 0:
            return
        # The same number if the kernel watched it already, perhaps under an older name.
        self._watches[watch] = folder
        self._untouched.add(folder)

    def is_untouched(self, folder: str) -> bool:
        """Whether nothing had changed in the folder when `update` was called."""
        return folder in self._untouched

    def update(self) -> None:
        """Take in what has changed until now."""
        while True:
            try:
                events = os.read(self._fd, 1 << 16) if self._fd >= 0 else b""
            except BlockingIOError:
                return
            offset = 0
            while offset < len(events):
                watch, mask, _, length = _EVENT.unpack_from(events, offset)
                offset += _EVENT.size + length
                self._take_in(watch, mask)
            if not events:
                return

    def _take_in(self, watch: int, mask: int) -> None:
        if mask & _IN_Q_OVERFLOW:
            self._untouched.clear()
            return
        folder = self._watches.get(watch)
        if folder is None:
            return
        self._untouched.discard(folder)
        if mask & _GONE:
            # Its name may belong to another folder from now on.
            del self._watches[watch]
            if not mask & _IN_IGNORED:
                _libc.inotify_rm_watch(self._fd, watch)
