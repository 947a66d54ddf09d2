"""Names in a FAT file system, read without trusting it.

Layout: Microsoft's "FAT: General Overview of On-Disk Format" (fatgen103). Whatever does not fit
ends the reading, so that any bytes have an answer; no chain of clusters is followed for long.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

# Offset and length in bytes to what lies there; shorter where the disk ends.
Read = Callable[[int, int], bytes]

_MAX_DIRECTORY_BYTES = 128 << 10
_DIRECTORY, _VOLUME_OR_LONG_NAME, _DELETED = 0x10, 0x08, 0xE5


def list_directory(read: Read, start: int, path: Sequence[bytes]) -> frozenset[bytes]:
    """The short names in a directory of the file system that begins at byte `start`.

    Names are 11 bytes in capitals and without a dot, as they lie on disk: b"BOOTX64 EFI". Empty
    if there is no such directory, or no FAT.
    """
    volume = _read_volume(read, start)
    if volume is None:
        return frozenset()
    entries = volume.read_root()
    for name in path:
        found = next((e for e in entries if e.name == name and e.is_directory), None)
        if found is None:
            return frozenset()
        entries = volume.read_chain(found.cluster)
    return frozenset(entry.name for entry in entries)


@dataclass(frozen=True, slots=True)
class _Entry:
    name: bytes
    is_directory: bool
    cluster: int


@dataclass(frozen=True, slots=True)
class _Volume:
    """Places are in bytes from the disk's start; root_cluster 0: the root lies at root_at."""

    read: Read
    entry_bits: int
    fat_at: int
    root_at: int
    root_bytes: int
    root_cluster: int
    data_at: int
    cluster_bytes: int
    cluster_count: int

    def read_root(self) -> Iterator[_Entry]:
        if self.root_cluster:
            return self.read_chain(self.root_cluster)
        return _entries(iter([self.read(self.root_at, self.root_bytes)]))

    def read_chain(self, cluster: int) -> Iterator[_Entry]:
        return _entries(self._clusters(cluster))

    def _clusters(self, cluster: int) -> Iterator[bytes]:
        # Counted: a chain may run in a circle.
        for _ in range(max(1, _MAX_DIRECTORY_BYTES // self.cluster_bytes)):
            if not 2 <= cluster < self.cluster_count + 2:
                return
            yield self.read(self.data_at + (cluster - 2) * self.cluster_bytes, self.cluster_bytes)
            cluster = self._next(cluster)

    def _next(self, cluster: int) -> int:
        width = 4 if self.entry_bits == 32 else 2
        data = self.read(self.fat_at + cluster * self.entry_bits // 8, width)
        if len(data) < width:
            return 0
        value = int.from_bytes(data, "little")
        if self.entry_bits == 12:
            return value >> 4 if cluster % 2 else value & 0xFFF
        return value & 0x0FFFFFFF


def _read_volume(read: Read, start: int) -> _Volume | None:
    boot = read(start, 512)
    if len(boot) < 512 or boot[510:512] != b"\x55\xaa":
        return None
    sector, per_cluster, reserved, fats, root_entries, few, _, small_fat = struct.unpack_from(
        "<HBHBHHBH", boot, 11
    )
    many, large_fat = struct.unpack_from("<II", boot, 32)
    root_sectors = -(-root_entries * 32 // sector) if sector else 0
    data_sector = reserved + fats * (small_fat or large_fat) + root_sectors
    clusters = ((few or many) - data_sector) // per_cluster if per_cluster else 0
    if sector not in (512, 1024, 2048, 4096) or not reserved or not fats or clusters <= 0:
        return None
    # As Linux tells them apart: mkfs makes FAT32 of any size if it is asked to.
    is_large = not small_fat
    return _Volume(
        read=read,
        entry_bits=32 if is_large else 16 if clusters >= 4085 else 12,
        fat_at=start + reserved * sector,
        root_at=start + (data_sector - root_sectors) * sector,
        root_bytes=root_sectors * sector,
        root_cluster=struct.unpack_from("<I", boot, 44)[0] & 0x0FFFFFFF if is_large else 0,
        data_at=start + data_sector * sector,
        cluster_bytes=per_cluster * sector,
        cluster_count=clusters,
    )


def _entries(blocks: Iterator[bytes]) -> Iterator[_Entry]:
    for block in blocks:
        for at in range(0, len(block) - 31, 32):
            entry = block[at : at + 32]
            if entry[0] == 0:
                return
            attributes = entry[11]
            if entry[0] == _DELETED or attributes & _VOLUME_OR_LONG_NAME:
                continue
            high, low = struct.unpack_from("<H4xH", entry, 20)
            yield _Entry(entry[:11], bool(attributes & _DIRECTORY), high << 16 | low)
