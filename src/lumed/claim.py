"""The kernel lock that says "somebody owns this": a running machine, a server, a staged VM.

An open-file-description lock (fcntl(2), F_OFD_SETLK) belongs to the descriptor, not to the
process: QEMU inherits it, and it goes away when the last copy is closed, however its holder
ends. It can be asked about without being taken.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

# struct flock on 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid (padded).
_FLOCK = "hhqqi4x"


def _request(kind: int) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, 0, 0, 0)


@dataclass(slots=True)
class RunLock:
    """A held lock. Pass `fd` to the child that shall own it, then close our copy."""

    fd: int

    def close(self) -> None:
        """Drop our copy; the lock stays while a child holds another."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def take_lock(path: Path) -> RunLock | None:
    """Take the lock on `path` (made if missing, mode 0600); None if somebody holds it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _request(fcntl.F_WRLCK))
    except (BlockingIOError, PermissionError):
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return RunLock(fd)


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock on `path`; a missing file is free."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _request(fcntl.F_WRLCK))
        return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)
    finally:
        os.close(fd)


async def wait_unlocked(path: Path, timeout_s: float) -> bool:
    """Wait until nobody holds the lock; False if timeout_s passed first.

    For a holder that has just ended: the kernel closes the descriptors of a process by a work
    item of its own (delayed_fput), which can run after the process has gone. Nothing tells of
    its end, so it is asked for every 2 ms.
    """
    give_up_at = time.monotonic() + timeout_s
    while is_locked(path):
        if time.monotonic() > give_up_at:
            return False
        await asyncio.sleep(0.002)
    return True


def find_holder(path: Path) -> int | None:
    """The pid of a process of ours that has `path` open: who holds its lock.

    The kernel does not tell the owner of an open-file-description lock, so /proc is searched.
    Used only when a server was killed between starting a machine and recording its pid.
    """
    target = path.stat()
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            for link in (process / "fd").iterdir():
                seen = link.stat()
                if (seen.st_dev, seen.st_ino) == (target.st_dev, target.st_ino):
                    return int(process.name)
        except OSError:
            continue
    return None
