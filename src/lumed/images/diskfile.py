"""A large file written past the page cache, where its file system can do that.

768 MiB took 0.2 s of CPU so, and 0.3 s to 1.6 s through the cache: in a VM its memory has to be
had from the host first, and writers of one file wait for each other's copying. What is written is
with the device, so that the sync at the end has next to nothing to do, and a failure is told by
the write. open(2), O_DIRECT.
"""

from __future__ import annotations

import ctypes
import errno
import os

BLOCK_BYTES = 4096


class DiskFile:
    """Writes an open file. Threads may share it if no two write to the same block."""

    def __init__(self, fd: int) -> None:
        """fd stays the caller's."""
        self._fd = fd
        self._direct_fd = -1
        try:
            flags = os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC
            self._direct_fd = os.open(f"/proc/self/fd/{fd}", flags)
        except OSError as error:
            if error.errno != errno.EINVAL:  # tmpfs before Linux 6.6, for one
                raise

    @property
    def is_direct(self) -> bool:
        """Whether the page cache is avoided, as far as is known."""
        return self._direct_fd >= 0

    def write(self, data: memoryview, at: int, *, in_step: bool) -> None:
        """Write all of `data`. in_step: where a block begins in the file, a page of memory does."""
        is_direct = in_step and self.is_direct
        while data:
            before = -at % BLOCK_BYTES
            whole_bytes = len(data) - len(data) % BLOCK_BYTES
            if is_direct and not before and whole_bytes:
                try:
                    count = os.pwrite(self._direct_fd, data[:whole_bytes], at)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    is_direct = False  # blocks are larger there
                    continue
            else:
                count = os.pwrite(self._fd, data[: before if is_direct and before else None], at)
            data = data[count:]
            at += count

    def close(self) -> None:
        """Close what was opened here."""
        if self.is_direct:
            os.close(self._direct_fd)
            self._direct_fd = -1


def find_page(buffer: bytearray) -> int:
    """Where the first page begins in a buffer that is a page larger than needed."""
    return -ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % BLOCK_BYTES
