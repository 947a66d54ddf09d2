"""Directories for images being made or sent, which a killed server cannot leave for good.

<parent>/<n>/    with the lock of its maker; after a kill the lock is free
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from pathlib import Path

from lumed.claim import RunLock, take_lock

LOCK = "owner.lock"


class Staging:
    """A new directory, with the lock that tells a sweep to leave it alone."""

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self._lock: RunLock | None = None
        self.path = parent / uuid.uuid4().hex

    def open(self) -> None:
        """Make the directory."""
        while self._lock is None:
            self.path.mkdir(parents=True, mode=0o700)
            # Another server's sweep may take the directory before we have locked it.
            with contextlib.suppress(FileNotFoundError):
                self._lock = take_lock(self.path / LOCK)
            if self._lock is None or not (self.path / LOCK).exists():
                self.close()
                self.path = self._parent / uuid.uuid4().hex

    def close(self) -> None:
        """Remove the directory, unless it was published or never made, and drop the lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def sweep_staging(parent: Path) -> int:
    """Remove the directories whose makers are gone; returns how many there were."""
    swept = 0
    try:
        leftovers = list(parent.iterdir())
    except FileNotFoundError:
        return 0
    for path in leftovers:
        # Finished or swept meanwhile; or a stray file, which is not ours.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            lock = take_lock(path / LOCK)
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                lock.close()
                swept += 1
    return swept
