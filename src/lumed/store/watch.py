"""The kernel's word on which folders have changed, so that the others need no look (inotify(7)).

A list of 2,000 VMs asked the kernel 8,000 questions, 31 ms, and the answer is nearly always that
nothing changed. What was changed before a list began is always seen by it: the kernel queues an
event before the change returns. Nothing here waits or wakes anybody; events are read when asked.
"""

from __future__ import annotations

from lumed.store.inotify import (
    IN_CLOSE_WRITE,
    IN_CREATE,
    IN_DELETE,
    IN_DELETE_SELF,
    IN_DONT_FOLLOW,
    IN_IGNORED,
    IN_MOVE_SELF,
    IN_MOVED_FROM,
    IN_MOVED_TO,
    IN_ONLYDIR,
    IN_Q_OVERFLOW,
    Inotify,
)

_GONE = IN_MOVE_SELF | IN_DELETE_SELF | IN_IGNORED
CHANGES = (
    IN_CLOSE_WRITE | IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE
    | IN_MOVE_SELF | IN_DELETE_SELF | IN_ONLYDIR | IN_DONT_FOLLOW
)  # fmt: skip


class FolderWatch:
    """Which of the added folders were left alone since; not for use by two threads at once.

    Where the kernel gives no watch (its limits, file systems without), a folder never counts as
    left alone. Changes by other machines, on a network file system, are not told of.
    """

    def __init__(self) -> None:
        self._watches: dict[int, str] = {}
        self._untouched: set[str] = set()
        self._inotify = Inotify()

    def add(self, folder: str) -> None:
        """Count the folder as untouched from now on, until a name or a file in it changes."""
        watch = self._inotify.add(folder, CHANGES)
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
        for watch, mask in self._inotify.read():
            self._take_in(watch, mask)

    def _take_in(self, watch: int, mask: int) -> None:
        if mask & IN_Q_OVERFLOW:
            self._untouched.clear()
            return
        folder = self._watches.get(watch)
        if folder is None:
            return
        self._untouched.discard(folder)
        if mask & _GONE:
            # Its name may belong to another folder from now on.
            del self._watches[watch]
            if not mask & IN_IGNORED:
                self._inotify.remove(watch)
