"""The qcow2 header parser against headers that lie."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumed.images.qcow2 import Qcow2Header, UnfitImage, parse_header

GIB = 1 << 30
FILE_BYTES = 1 << 20


def header(
    *,
    version: int = 3,
    backing_offset: int = 0,
    cluster_bits: int = 16,
    size: int = 4 * GIB,
    crypt: int = 0,
    l1_entries: int = 8,
    l1_offset: int = 0x30000,
    refcount_offset: int = 0x10000,
    refcount_clusters: int = 1,
    snapshots: int = 0,
    snapshots_offset: int = 0,
    features: int = 0,
    refcount_order: int = 4,
    header_bytes: int = 112,
    compression: int = 0,
    extensions: bytes = b"",
) -> bytes:
    """A header as qemu-img writes it for 4 GiB, with the fields that a test changes."""
    first = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", version, backing_offset, 0, cluster_bits,
        size, crypt, l1_entries, l1_offset, refcount_offset, refcount_clusters,
        snapshots, snapshots_offset)  # fmt: skip
    if version == 2:
        return (first + extensions).ljust(65536, b"\0")
    more = struct.pack(">QQQII", features, 0, 0, refcount_order, header_bytes)
    return (first + more + bytes([compression]).ljust(8, b"\0") + extensions).ljust(65536, b"\0")


def extension(kind: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    size = len(data) if length is None else length
    return struct.pack(">II", kind, size) + data.ljust(-(-len(data) // 8) * 8, b"\0")


@pytest.mark.parametrize(
    "good",
    [
        header(),
        header(version=2),
        header(header_bytes=104),
        header(features=8, compression=1),
        header(features=16, l1_entries=16),
        header(size=400 * GIB, l1_entries=800),
        header(snapshots=1, snapshots_offset=0x20000),
        header(extensions=extension(0x6803F857, b"features") + extension(0)),
    ],
)
def test_clean_headers_pass(good: bytes) -> None:
    parsed = parse_header(good, FILE_BYTES)
    assert isinstance(parsed, Qcow2Header)
    assert parsed.virtual_size_bytes in (4 * GIB, 400 * GIB)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (header(version=1), "version 1"),
        (header(version=4), "version 4"),
        (header(backing_offset=0x210), "backing file"),
        (header(extensions=extension(0xE2792ACA, b"raw")), "backing file"),
        (header(features=4), "external data file"),
        (header(extensions=extension(0x44415441, b"/etc/shadow")), "external data file"),
        (
            header(extensions=extension(0x6803F857, b"x" * 9) + extension(0x44415441, b"/x")),
            "external data file",
        ),
        (header(version=2, extensions=extension(0x44415441, b"/x")), "external data file"),
        (header(crypt=1), "encrypted"),
        (header(crypt=2), "encrypted"),
        (header(features=1), "marked dirty"),
        (header(features=2), "marked corrupt"),
        (header(features=32), "unknown qcow2 features"),
        (header(features=1 << 63), "unknown qcow2 features"),
        (header(features=8), "compression type"),
        (header(compression=1), "compression type"),
        (header(features=16, l1_entries=15), "first-level table"),
        (header(features=16, cluster_bits=13, l1_entries=4096), "too small"),
        (header(cluster_bits=8), "cluster size"),
        (header(cluster_bits=22), "cluster size"),
        (header(cluster_bits=0xFFFFFFFF), "cluster size"),
        (header(size=0), "size 0"),
        (header(size=(64 << 40) + 512), "at most 64 TB"),
        (header(size=1 << 63), "at most 64 TB"),
        (header(size=4 * GIB - 1), "multiple of 512"),
        (header(l1_entries=7), "first-level table"),
        (header(l1_entries=0xFFFFFFFF), "first-level table"),
        (header(l1_offset=0), "misplaced"),
        (header(l1_offset=0x30001), "misplaced"),
        (header(l1_offset=1 << 40), "behind the end"),
        (header(refcount_offset=8), "misplaced"),
        (header(refcount_offset=1 << 62), "behind the end"),
        (header(refcount_clusters=0), "reference count table"),
        (header(refcount_clusters=0xFFFFFFFF), "reference count table"),
        (header(refcount_order=7), "reference counts"),
        (header(header_bytes=96), "header length"),
        (header(header_bytes=105), "header length"),
        (header(header_bytes=0xFFFFFFF8), "header length"),
        (header(snapshots=70000, snapshots_offset=0x20000), "snapshots"),
        (header(snapshots=1, snapshots_offset=1 << 50), "behind the end"),
        (header(extensions=extension(0x1234, length=0xFFFFFFFF)), "leaves the first cluster"),
        (header()[:71], "ends inside"),
        (header()[:100], "ends inside"),
        (b"QFI\xfb", "ends inside"),
    ],
)
def test_unfit_headers_are_refused_with_their_reason(bad: bytes, reason: str) -> None:
    with pytest.raises(UnfitImage, match=reason):
        parse_header(bad, FILE_BYTES)


@given(
    st.lists(st.tuples(st.integers(0, 160), st.binary(min_size=1, max_size=8)), max_size=6),
    st.integers(0, 65536),
    st.integers(0, 1 << 62),
)
def test_a_mutated_header_is_either_refused_or_safe(
    patches: list[tuple[int, bytes]], keep: int, file_bytes: int
) -> None:
    head = bytearray(header())
    for at, patch in patches:
        head[at : at + len(patch)] = patch
    for candidate in (bytes(head), bytes(head[:keep])):
        try:
            parsed = parse_header(candidate, file_bytes)
        except UnfitImage:
            continue
        assert candidate[8:16] == bytes(8)  # no backing file
        assert parsed.version == 2 or not candidate[79] & 0b111  # clean, no data file
        assert 0 < parsed.virtual_size_bytes <= 64 << 40
