"""Which parts of a disk hold data: the rest is zero, and is not read."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path

from lumed.osproc import run_tool_blocking

BLOCK_BYTES = 1 << 20
# One call's answer is some MiB of JSON at worst (every second cluster of 64 KiB in use).
_WINDOW_BYTES = 16 << 30
_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class DiskFile:
    """A file of a disk's chain, as it is now; equal means that its content is the same."""

    path: str
    inode: int
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class DiskMap:
    """A disk's size, its chain from the top, and one byte for each block: 1 if it may hold data."""

    size_bytes: int
    files: tuple[DiskFile, ...]
    blocks: bytes

    def count_data(self, offset: int, length: int) -> int:
        """The bytes of the blocks with data in a range that begins with a block."""
        first, end = offset // BLOCK_BYTES, -(-(offset + length) // BLOCK_BYTES)
        # The last block may reach beyond the range, which is the disk's end then.
        beyond = (end * BLOCK_BYTES - offset - length) * self.blocks[end - 1]
        return self.blocks.count(1, first, end) * BLOCK_BYTES - beyond


def read_map(disk: Path, stop: threading.Event | None = None) -> DiskMap:
    """Map a qcow2 disk (absolute path) that nobody writes to.

    Raises ToolFailed if QEMU cannot open its chain, Stopped soon after `stop` is set.
    """
    info = json.loads(_run(stop, "info", "--backing-chain", disk))
    files = []
    for entry in info:
        path = Path(entry["filename"])
        found = path.stat()
        files.append(DiskFile(str(path), found.st_ino, found.st_size, found.st_mtime_ns))
    size = int(info[0]["virtual-size"])
    blocks = bytearray(-(-size // BLOCK_BYTES))
    for start in range(0, size, _WINDOW_BYTES):
        length = min(_WINDOW_BYTES, size - start)
        window = (f"--start-offset={start}", f"--max-length={length}")
        for extent in json.loads(_run(stop, "map", *window, disk)):
            if not extent["zero"]:
                first = extent["start"] // BLOCK_BYTES
                end = -(-(extent["start"] + extent["length"]) // BLOCK_BYTES)
                blocks[first:end] = b"\1" * (end - first)
    return DiskMap(size, tuple(files), bytes(blocks))


def _run(stop: threading.Event | None, command: str, *arguments: str | Path) -> bytes:
    argv = ["qemu-img", command, "--output=json", "-f", "qcow2", *arguments]
    return run_tool_blocking(argv, timeout_s=_TIMEOUT_S, stop=stop)
