"""Unpacking a blob as it arrives, into a buffer of the caller's: gzip, zstd, Apple's LZ4.

The input is a stranger's: what it may cost in memory is bounded here, what it may write is
bounded by the caller, and an input that ends early is an error in every format.
"""

from __future__ import annotations

import io
import struct
from typing import Protocol, cast

from lumed.images.formats.plan import Compression

MAX_WINDOW_BYTES = 128 << 20
# What zstd's levels up to 19 use at most; larger windows are allowed for one blob at a time.
USUAL_WINDOW_BYTES = 8 << 20
HEAD_BYTES = 18  # the longest header of a zstd frame

_READ_BYTES = 256 << 10
_MAX_LZ4_BLOCK_BYTES = 16 << 20
_LZ4_HISTORY_BYTES = 64 << 10
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_MAGICS = (
    (b"\x1f\x8b\x08", Compression.GZIP),
    (ZSTD_MAGIC, Compression.ZSTD),
    (b"bv41", Compression.LZ4),
    (b"bv4-", Compression.LZ4),
    (b"bv4$", Compression.LZ4),
)


class BadData(Exception):
    """A blob cannot be unpacked; str() says why, as in "it …"."""


class Decoder(Protocol):
    """Gives unpacked bytes. Raises BadData."""

    def readinto(self, buffer: memoryview, /) -> int:
        """Up to the buffer's length of them; 0 at the end."""

    def take_zeros(self, limit: int) -> int:
        """How many zeros come next that are as well left out, at most limit; readinto gives
        those that are not taken so.
        """


def find_compression(head: bytes) -> Compression:
    """The compression of a blob that begins with `head` (HEAD_BYTES of it, or all)."""
    if is_skippable(head):
        return Compression.ZSTD  # as pzstd writes it
    return next((kind for magic, kind in _MAGICS if head.startswith(magic)), Compression.RAW)


def is_skippable(head: bytes) -> bool:
    """Whether a zstd frame begins so that holds nothing of the content."""
    return head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50


def read_window(head: bytes) -> int:
    """The memory in bytes that the first frame of a zstd blob asks for. Raises BadData."""
    import zstandard

    try:
        return int(zstandard.get_frame_parameters(head).window_size)
    except zstandard.ZstdError as error:
        raise BadData(f"it is no zstd stream: {error}") from error


def open_decoder(source: io.RawIOBase, compression: Compression, max_window: int) -> Decoder:
    """The decoder that reads `source`; max_window in bytes is for zstd."""
    if compression is Compression.GZIP:
        return _Gzip(source)
    if compression is Compression.ZSTD:
        from lumed.images.zstd import ZstdDecoder

        return ZstdDecoder(source, max_window)
    if compression is Compression.LZ4:
        return _AppleLz4(source)
    return _Raw(source)


class _Bytes:
    """A decoder that gives all of its bytes."""

    def take_zeros(self, limit: int) -> int:
        del limit
        return 0


class _Raw(_Bytes):
    def __init__(self, source: io.RawIOBase) -> None:
        self._source = source

    def readinto(self, buffer: memoryview, /) -> int:
        return self._source.readinto(buffer) or 0


class _Gzip(_Bytes):
    """isal: three times as fast as zlib. It checks the sums, and that each member ends."""

    def __init__(self, source: io.RawIOBase) -> None:
        from isal import igzip, isal_zlib

        self._errors = (igzip.BadGzipFile, cast(type[Exception], isal_zlib.error))
        self._stream = igzip.IGzipFile(fileobj=source, mode="rb")  # type: ignore[no-untyped-call]

    def readinto(self, buffer: memoryview, /) -> int:
        try:
            return int(self._stream.readinto(buffer))
        except EOFError as error:
            raise BadData("its gzip stream is cut off") from error
        except self._errors as error:
            raise BadData(f"its gzip stream is damaged: {error}") from error


class _AppleLz4(_Bytes):
    """Blocks of "bv41", unpacked and packed length, LZ4; or "bv4-", length, bytes; "bv4$" ends.

    Matches may reach 64 KiB back into earlier blocks. Apple's Compression framework, LZ4.
    """

    def __init__(self, source: io.RawIOBase) -> None:
        import lz4.block

        self._errors = lz4.block.LZ4BlockError
        self._unpack = lz4.block.decompress
        self._source = io.BufferedReader(source, _READ_BYTES)
        self._block = memoryview(b"")
        self._history = b""
        self._ended = False

    def readinto(self, buffer: memoryview, /) -> int:
        while not self._block and not self._ended:
            self._read_block()
        count = min(len(buffer), len(self._block))
        buffer[:count] = self._block[:count]
        self._block = self._block[count:]
        return count

    def _read_block(self) -> None:
        magic = self._read(4)
        if magic == b"bv4$":
            self._ended = True
            if self._source.read(1):
                raise BadData("its LZ4 stream goes on after its end")
            return
        if magic == b"bv41":
            size, packed_size = struct.unpack("<II", self._read(8))
            self._check_size(max(size, packed_size))
            packed = self._read(packed_size)
            try:
                block = self._unpack(packed, uncompressed_size=size, dict=self._history)
            except self._errors as error:
                raise BadData(f"its LZ4 stream is damaged: {error}") from error
            if len(block) != size:
                raise BadData(f"an LZ4 block unpacks to {len(block)} bytes and not to {size}")
        elif magic == b"bv4-":
            (size,) = struct.unpack("<I", self._read(4))
            self._check_size(size)
            block = self._read(size)
        else:
            raise BadData(f"its LZ4 stream has a block of the unknown kind {magic!r}")
        self._block = memoryview(block)
        if len(block) >= _LZ4_HISTORY_BYTES:
            self._history = block[-_LZ4_HISTORY_BYTES:]
        else:
            self._history = (self._history + block)[-_LZ4_HISTORY_BYTES:]

    def _check_size(self, size: int) -> None:
        if size > _MAX_LZ4_BLOCK_BYTES:
            raise BadData(f"an LZ4 block claims {size} bytes; at most 16 MiB are taken")

    def _read(self, count: int) -> bytes:
        data = self._source.read(count)
        if len(data) != count:
            raise BadData("its LZ4 stream is cut off")
        return data
