"""What earlier pushes found out about a disk, so that a repeated one need not compress again.

    <directory>/<id>.jsonl    a line for each slice of one unchanged disk, cut in one way

Lines are only appended: a kill leaves at most a torn last one, which is not read. The record is
about content, not about a registry: whether that has the blob is asked there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from dataclasses import asdict
from pathlib import Path

from lumed.images.diskmap import DiskMap
from lumed.images.manifests import PushedSlice

_MOST_RECORDS = 64  # of some 300 bytes a slice
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class PushRecord:
    """The record of one disk; may be shared by threads. Blocks for microseconds."""

    def __init__(self, directory: Path, disk: DiskMap, cut: str) -> None:
        """cut says how the disk is cut and wrapped; other cuts have other records.

        Removes the records that were not used for longest. Raises OSError.
        """
        files = [asdict(file) for file in disk.files]
        identity = json.dumps([cut, disk.size_bytes, files]).encode()
        self._path = directory / f"{hashlib.sha256(identity).hexdigest()[:32]}.jsonl"
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path.touch(0o600)
        _remove_oldest(directory)
        self._parts = _read_parts(self._path)

    def find(self, offset: int) -> PushedSlice | None:
        """The slice at that offset, if it was compressed before."""
        return self._parts.get(offset)

    def add(self, part: PushedSlice) -> None:
        """Keep what a slice became."""
        line = json.dumps(asdict(part)).encode()
        # One write at the end of the file, whole for other threads. It begins a line of its own,
        # whatever a killed push left there.
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, b"\n" + line + b"\n")
        finally:
            os.close(fd)


def _read_parts(path: Path) -> dict[int, PushedSlice]:
    parts = {}
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, TypeError):
            part = PushedSlice(**json.loads(line))
            numbers = (part.offset, part.length, part.size_bytes)
            texts = (part.digest, part.content_digest)
            if all(type(n) is int for n in numbers) and all(map(_DIGEST.fullmatch, texts)):
                parts[part.offset] = part
    return parts


def _remove_oldest(directory: Path) -> None:
    found = []
    for path in directory.glob("*.jsonl"):
        with contextlib.suppress(FileNotFoundError):
            found.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(found)[:-_MOST_RECORDS]:
        path.unlink(missing_ok=True)
