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


# QEMU's own locks on images (block/file-posix.c): whoever may write holds byte 100 + 1, and
# whoever lets nobody else write holds byte 200 + 1.
_QEMU_WRITES_AT, _QEMU_REFUSES_WRITES_AT = 101, 201


def _request(kind: int, start: int = 0, length: int = 0) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, start, length, 0)


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
        is_ours = _try_lock(fd, _request(fcntl.F_WRLCK))
    except BaseException:
        os.close(fd)
        raise
    if not is_ours:
        os.close(fd)
        return None
    return RunLock(fd)


def try_lock_byte(fd: int, kind: int, at: int) -> bool:
    """Take (fcntl.F_RDLCK, F_WRLCK) or drop (F_UNLCK) a lock on one byte; False if it is held."""
    return _try_lock(fd, _request(kind, at, 1))


def _try_lock(fd: int, request: bytes) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _is_held(fd: int, request: bytes) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request)
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)


def is_written_by_qemu(fd: int) -> bool:
    """Whether a QEMU, of whatever server, has the disk image open for writing."""
    return _is_held(fd, _request(fcntl.F_WRLCK, _QEMU_WRITES_AT, 1))


def refuse_qemu_writes(fd: int) -> bool:
    """Keep QEMU from opening the disk image for writing, as long as fd is open."""
    return try_lock_byte(fd, fcntl.F_RDLCK, _QEMU_REFUSES_WRITES_AT)


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock on `path`; a missing file is free."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        return _is_held(fd, _request(fcntl.F_WRLCK))
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
