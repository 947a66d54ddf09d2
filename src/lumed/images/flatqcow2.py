"""A disk's content as one self-contained qcow2 file, made piece by piece without being stored.

`qemu-img convert` would need the whole file on disk before its first byte can be sent. With
clusters as large as the blocks of the map, where each byte lies follows from the map alone:

    header, reference count table, reference counts, first-level table, second-level tables, data

Layout: QEMU's docs/interop/qcow2.txt, version 3.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate

from lumed.images.diskmap import BLOCK_BYTES, DiskMap
from lumed.images.gzipper import Piece
from lumed.images.qcow2 import MAGIC

_CLUSTER_BITS = 20
_CLUSTER = BLOCK_BYTES
_L2_ENTRIES = _CLUSTER // 8
_REFCOUNTS = _CLUSTER // 2  # of 16 bits
_IN_USE_ONCE = 1 << 63  # "copied": the reference count is exactly one
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")


class FlatQcow2:
    """How the file of a disk is laid out. read gives bytes of the disk by offset and length."""

    def __init__(self, disk: DiskMap, read: Callable[[int, int], bytes | bytearray]) -> None:
        self._disk = disk
        self._read = read
        starts = range(0, len(disk.blocks), _L2_ENTRIES)
        # How much data lies under each second-level table; none: no table.
        self._data_counts = [disk.blocks.count(1, at, at + _L2_ENTRIES) for at in starts]
        tables = sum(map(bool, self._data_counts))
        rest = 3 + tables + sum(self._data_counts)
        counts = -(-rest // _REFCOUNTS)
        while counts * _REFCOUNTS < rest + counts:
            counts += 1
        self._refcount_clusters = counts
        self._first_level_at = 2 + counts
        self._tables_at = 3 + counts
        self._data_at = 3 + counts + tables
        self._clusters = rest + counts
        self.size_bytes = self._clusters * _CLUSTER

    def pieces(self) -> Iterator[Piece]:
        """The file from its first to its last byte."""
        yield _cluster(self._header)
        yield _cluster(self._refcount_table)
        for number in range(self._refcount_clusters):
            yield _cluster(partial(self._refcounts, number))
        yield _cluster(self._first_level)
        # Where the data under each second-level table begins.
        data_starts = accumulate(self._data_counts, initial=self._data_at)
        for number, (count, start) in enumerate(zip(self._data_counts, data_starts, strict=False)):
            if count:
                yield _cluster(partial(self._second_level, number, start))
        for number, has_data in enumerate(self._disk.blocks):
            if has_data:
                yield _cluster(partial(self._block, number))

    def _header(self) -> bytes:
        return _HEADER.pack(
            MAGIC,
            3,
            *(0, 0),  # no backing file
            _CLUSTER_BITS,
            self._disk.size_bytes,
            0,  # not encrypted
            len(self._data_counts),
            self._first_level_at * _CLUSTER,
            1 * _CLUSTER,  # the reference count table,
            1,  # which for 64 TB takes a thousandth of its one cluster
            *(0, 0),  # no snapshots
            *(0, 0, 0),  # no features
            4,  # reference counts of 2^4 bits
            _HEADER.size,
        )

    def _refcount_table(self) -> bytes:
        return _entries([(2 + number) * _CLUSTER for number in range(self._refcount_clusters)])

    def _refcounts(self, number: int) -> bytes:
        return b"\0\1" * min(self._clusters - number * _REFCOUNTS, _REFCOUNTS)

    def _first_level(self) -> bytes:
        numbers = accumulate(map(bool, self._data_counts), initial=self._tables_at)
        return _entries(
            [
                number * _CLUSTER | _IN_USE_ONCE if count else 0
                for count, number in zip(self._data_counts, numbers, strict=False)
            ]
        )

    def _second_level(self, number: int, data_start: int) -> bytes:
        blocks = self._disk.blocks[number * _L2_ENTRIES : (number + 1) * _L2_ENTRIES]
        numbers = accumulate(blocks, initial=data_start)
        return _entries(
            [
                place * _CLUSTER | _IN_USE_ONCE if has_data else 0
                for has_data, place in zip(blocks, numbers, strict=False)
            ]
        )

    def _block(self, number: int) -> bytes | bytearray:
        offset = number * _CLUSTER
        return self._read(offset, min(_CLUSTER, self._disk.size_bytes - offset))


def _cluster(make: Callable[[], bytes | bytearray]) -> Piece:
    return Piece(_CLUSTER, lambda: make().ljust(_CLUSTER, b"\0"))


def _entries(values: list[int]) -> bytes:
    return struct.pack(f">{len(values)}Q", *values)
