"""The qcow2 header, read as what it is: bytes from a stranger.

QEMU follows what a header says: a backing file or an external data file can be any file of the
host, and the guest would then read it. So the header is judged here, before QEMU opens the file.
Layout and limits: QEMU's docs/interop/qcow2.txt.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

MAGIC = b"QFI\xfb"
HEAD_BYTES = 2 << 20  # the header and its extensions lie in the first cluster, of at most 2 MiB
MAX_VIRTUAL_BYTES = 64 << 40

_V2_BYTES = 72
_V3_BYTES = 104
_COMPRESSION_TYPE_AT = 104
_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = (1 << bit for bit in range(5))
_KNOWN_FEATURES = _DIRTY | _CORRUPT | _DATA_FILE | _COMPRESSION | _EXTENDED_L2
_EXTENSION_END = 0
_EXTENSION_BACKING_FORMAT = 0xE2792ACA
_EXTENSION_DATA_FILE = 0x44415441
_MAX_L1_BYTES = 32 << 20
_MAX_REFCOUNT_TABLE_BYTES = 8 << 20
_MAX_SNAPSHOTS = 65536

_FLATTEN = "make it self-contained: qemu-img convert -f qcow2 -O qcow2 OLD NEW"
_REPAIR = "if it is yours, repair it: qemu-img check -f qcow2 -r all FILE"
_FETCH_AGAIN = "download or copy the image again"


class UnfitImage(Exception):
    """Why a file is not taken as a disk; str() is the reason, hint what to do about it."""

    def __init__(self, reason: str, hint: str | None = None) -> None:
        super().__init__(reason)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Qcow2Header:
    """What a header that passed all checks says."""

    version: int
    virtual_size_bytes: int
    cluster_bytes: int
    snapshots: int


def parse_header(head: bytes, file_bytes: int) -> Qcow2Header:
    """Judge the header of a qcow2 file whose first HEAD_BYTES (or all) are `head`.

    Raises UnfitImage unless the file is self-contained, clean, and its tables lie inside it.
    """
    if len(head) < _V2_BYTES or not head.startswith(MAGIC):
        raise UnfitImage("it ends inside its qcow2 header", _FETCH_AGAIN)
    version, backing_offset, _, cluster_bits = struct.unpack_from(">IQII", head, 4)
    size, crypt_method, l1_entries = struct.unpack_from(">QII", head, 24)
    l1_offset, refcount_offset, refcount_clusters = struct.unpack_from(">QQI", head, 40)
    snapshots, snapshots_offset = struct.unpack_from(">IQ", head, 60)
    if version == 1:
        raise UnfitImage(
            "it is a qcow disk of the old version 1",
            "convert it: qemu-img convert -f qcow -O qcow2 OLD NEW",
        )
    if version not in (2, 3):
        raise UnfitImage(f"its qcow2 version {version} is unknown")
    if backing_offset:
        raise UnfitImage("it has a backing file, and only self-contained images are used", _FLATTEN)
    if crypt_method:
        raise UnfitImage("it is encrypted")
    _check(9 <= cluster_bits <= 21, f"its cluster size of 2^{cluster_bits} bytes is impossible")
    cluster = 1 << cluster_bits
    header_bytes = _V2_BYTES if version == 2 else _check_features(head, cluster_bits)
    _check_extensions(head[:cluster], header_bytes)
    _check_size(size)

    entry_bytes = 16 if version == 3 and _features(head) & _EXTENDED_L2 else 8
    needed = -(-size // (cluster * (cluster // entry_bytes)))
    _check(
        needed <= l1_entries <= _MAX_L1_BYTES // 8,
        f"its first-level table of {l1_entries} entries does not fit its size of {size} bytes",
    )
    _check_place("first-level table", l1_offset, l1_entries * 8, cluster, file_bytes)
    refcount_bytes = refcount_clusters * cluster
    _check(
        0 < refcount_bytes <= _MAX_REFCOUNT_TABLE_BYTES,
        f"its reference count table of {refcount_clusters} clusters is impossible",
    )
    # QEMU writes the last table of a small file only as far as it has content.
    _check_place("reference count table", refcount_offset, 1, cluster, file_bytes)
    _check(snapshots <= _MAX_SNAPSHOTS, f"it claims {snapshots} snapshots")
    if snapshots:
        _check_place("snapshot table", snapshots_offset, 1, cluster, file_bytes)
    return Qcow2Header(version, size, cluster, snapshots)


def _features(head: bytes) -> int:
    return int(struct.unpack_from(">Q", head, 72)[0])


def _check_features(head: bytes, cluster_bits: int) -> int:
    """Judge the fields that version 3 added; returns the header's length."""
    if len(head) < _V3_BYTES:
        raise UnfitImage("it ends inside its qcow2 header", _FETCH_AGAIN)
    features = _features(head)
    refcount_order, header_bytes = struct.unpack_from(">II", head, 96)
    if features & _CORRUPT:
        raise UnfitImage("it is marked corrupt", _REPAIR)
    if features & _DIRTY:
        raise UnfitImage("it was not closed cleanly (marked dirty)", _REPAIR)
    if features & _DATA_FILE:
        raise UnfitImage("its data lies in an external data file", _FLATTEN)
    if features & ~_KNOWN_FEATURES:
        raise UnfitImage(f"it needs unknown qcow2 features ({features & ~_KNOWN_FEATURES:#x})")
    _check(refcount_order <= 6, f"its reference counts of 2^{refcount_order} bits are impossible")
    _check(
        _V3_BYTES <= header_bytes <= min(len(head), 1 << cluster_bits) and header_bytes % 8 == 0,
        f"its header length of {header_bytes} bytes is impossible",
    )
    kind = head[_COMPRESSION_TYPE_AT] if header_bytes > _COMPRESSION_TYPE_AT else 0
    expected = 1 if features & _COMPRESSION else 0
    _check(kind == expected, f"its compression type {kind} does not fit its feature bits")
    _check(
        not features & _EXTENDED_L2 or cluster_bits >= 14,
        "its clusters are too small for extended entries",
    )
    return int(header_bytes)


def _check_extensions(first_cluster: bytes, start: int) -> None:
    at = start
    while at + 8 <= len(first_cluster):
        kind, length = struct.unpack_from(">II", first_cluster, at)
        if kind == _EXTENSION_END:
            return
        _check(at + 8 + length <= len(first_cluster), "a header extension leaves the first cluster")
        if kind == _EXTENSION_DATA_FILE:
            raise UnfitImage("it names an external data file", _FLATTEN)
        if kind == _EXTENSION_BACKING_FORMAT:
            raise UnfitImage("it names the format of a backing file", _FLATTEN)
        at += 8 + (length + 7) // 8 * 8


def _check_size(size: int) -> None:
    if size == 0:
        raise UnfitImage("it is an empty disk of size 0")
    if size > MAX_VIRTUAL_BYTES:
        raise UnfitImage(f"it claims a size of {size} bytes; at most 64 TB are taken")
    _check(size % 512 == 0, f"its size of {size} bytes is no multiple of 512")


def _check_place(what: str, offset: int, length: int, cluster: int, file_bytes: int) -> None:
    _check(offset > 0 and offset % cluster == 0, f"its {what} is misplaced")
    if offset + length > file_bytes:
        raise UnfitImage(f"its {what} lies behind the end of the file", _FETCH_AGAIN)


def _check(holds: bool, reason: str) -> None:
    if not holds:
        raise UnfitImage(f"its qcow2 header is damaged: {reason}", _FETCH_AGAIN)
