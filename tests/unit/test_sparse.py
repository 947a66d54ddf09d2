"""Streams written to disks, and Apple's LZ4, on whatever content and in whatever pieces."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumed.images.decode import open_decoder
from lumed.images.diskfile import BLOCK_BYTES, DiskFile
from lumed.images.formats.plan import Compression
from lumed.images.sparse import SparseWriter, TooLong, find_data
from tests.doubles import apple_lz4

# Runs of a byte, mostly zeros and mostly around the sizes where something changes.
_RUNS = st.lists(
    st.tuples(
        st.sampled_from([0, 0, 0, 1, 255]),
        st.one_of(
            st.integers(1, 10),
            st.integers(4000, 4200),
            st.sampled_from([4096, 8192, 65536, 65535, 131072, 1 << 20]),
        ),
    ),
    max_size=12,
)
CONTENTS = _RUNS.map(lambda runs: b"".join(bytes([byte]) * count for byte, count in runs))


def write(
    fd: int,
    content: bytes,
    offsets: list[int],
    pieces: list[int],
    beside: ThreadPoolExecutor | None = None,
) -> int:
    """Write content in pieces, of which whole ones of zeros are skipped."""
    with contextlib.closing(DiskFile(fd)) as disk:
        writer = SparseWriter(disk, offsets, len(content), beside=beside)
        at = turn = 0
        while at < len(content):
            space = writer.space()
            count = min(len(space), len(content) - at, pieces[turn % len(pieces)])
            piece = content[at : at + count]
            if any(piece):
                space[:count] = piece
                writer.commit(count)
            else:
                writer.skip(count)
            at += count
            turn += 1
        return writer.finish()


@settings(max_examples=60, deadline=None)
@given(
    content=CONTENTS,
    first=st.one_of(st.integers(0, 9000), st.sampled_from([0, 4096, 1 << 20])),
    pieces=st.lists(st.sampled_from([1000, 4096, 77_777, 1 << 20]), min_size=1, max_size=4),
    is_beside=st.booleans(),
)
def test_a_stream_lies_on_the_disk_at_each_place(
    content: bytes, first: int, pieces: list[int], is_beside: bool
) -> None:
    second = first + len(content) + 17
    with tempfile.TemporaryFile() as file, ThreadPoolExecutor(1) as pool:
        beside = pool if is_beside else None
        assert write(file.fileno(), content, [first, second], pieces, beside) == len(content)
        os.ftruncate(file.fileno(), second + len(content))
        assert os.pread(file.fileno(), 1 << 30, 0) == (bytes(first) + content + bytes(17) + content)


@settings(max_examples=60, deadline=None)
@given(content=CONTENTS, offset=st.one_of(st.just(0), st.integers(0, 5000)))
def test_data_is_found_in_whole_blocks_of_the_disk(content: bytes, offset: int) -> None:
    runs = list(find_data(bytearray(content), 0, len(content), offset))
    assert all(start < end for start, end in runs)
    assert all(a[1] < b[0] for a, b in pairwise(runs))
    covered = bytearray(len(content))
    for start, end in runs:
        covered[start:end] = b"\1" * (end - start)
    for start in range(-(offset % BLOCK_BYTES), len(content), BLOCK_BYTES):
        block = slice(max(0, start), start + BLOCK_BYTES)
        assert any(content[block]) == any(covered[block])
        assert covered[block].count(1) in (0, len(covered[block]))


def test_zeros_take_no_space(tmp_path: Path) -> None:
    content = bytes(3 << 20) + b"x" * 4096 + bytes(2 << 20)
    with (tmp_path / "disk").open("wb") as file:
        write(file.fileno(), content, [0], [70_000])
        os.fsync(file.fileno())
        assert os.fstat(file.fileno()).st_blocks * 512 <= 64 << 10


@pytest.mark.parametrize("refused", ["open", "pwrite"])
def test_a_disk_is_written_where_the_page_cache_cannot_be_avoided(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file, pwrite = os.open, os.pwrite
    tried = []

    def open_plain(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            tried.append("open")
            raise OSError(errno.EINVAL, "Invalid argument")
        return open_file(path, flags, mode)

    def pwrite_plain(fd: int, data: memoryview, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            tried.append("pwrite")
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, refused, open_plain if refused == "open" else pwrite_plain)
    content = b"x" * 3_000_000
    with (tmp_path / "disk").open("wb") as file:
        write(file.fileno(), content, [0], [70_000])
    assert (tmp_path / "disk").read_bytes() == content
    assert set(tried) == {refused}


@pytest.mark.parametrize("offset", [0, 512])
def test_whole_blocks_are_written_past_the_page_cache(
    offset: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    written = {True: 0, False: 0}

    def watch(fd: int, data: memoryview, at: int) -> int:
        written[bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)] += len(data)
        return pwrite(fd, data, at)

    monkeypatch.setattr(os, "pwrite", watch)
    with (tmp_path / "disk").open("wb") as file, contextlib.closing(DiskFile(file.fileno())) as d:
        if not d.is_direct:
            pytest.skip("this file system has nothing but the page cache")
        write(file.fileno(), b"x" * 3_000_000, [offset], [70_000])
    assert 0 < written[False] < 2 * BLOCK_BYTES


def test_nothing_is_written_past_the_limit() -> None:
    with tempfile.TemporaryFile() as file:
        writer = SparseWriter(DiskFile(file.fileno()), [0], 10)
        writer.space()[:11] = b"x" * 11
        with pytest.raises(TooLong):
            writer.commit(11)
        assert os.fstat(file.fileno()).st_size == 0


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.binary(min_size=1, max_size=3000), min_size=1, max_size=6),
    order=st.lists(st.integers(0, 5), max_size=60),
    block_bytes=st.sampled_from([1, 500, 4096, 65536, 100_000]),
    buffer_bytes=st.sampled_from([7, 4096, 1 << 20]),
)
def test_apples_lz4_is_unpacked_with_matches_across_blocks(
    parts: list[bytes], order: list[int], block_bytes: int, buffer_bytes: int
) -> None:
    # The same parts again and again, so that most of a block is found in those before it.
    content = b"".join(parts[index % len(parts)] for index in order)[: 300 * block_bytes]
    assert unpack_lz4(apple_lz4.pack(content, block_bytes), buffer_bytes) == content


def test_a_match_may_reach_64_kib_back() -> None:
    content = os.urandom(65_535) * 3
    packed = apple_lz4.pack(content, 65_535)
    assert len(packed) < 70_000  # else nothing was found across blocks
    assert unpack_lz4(packed, 1 << 20) == content


def unpack_lz4(packed: bytes, buffer_bytes: int) -> bytes:
    decoder = open_decoder(_Raw(packed), Compression.LZ4, 0)
    buffer = memoryview(bytearray(buffer_bytes))
    out = bytearray()
    while count := decoder.readinto(buffer):
        out += buffer[:count]
    return bytes(out)


class _Raw(io.RawIOBase):
    def __init__(self, content: bytes) -> None:
        self._content = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        return self._content.readinto(buffer)
