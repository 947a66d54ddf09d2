"""A disk written as it streams in: zeros stay holes, nothing goes past its end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import Protocol

from lumed.images.diskfile import BLOCK_BYTES, DiskFile, find_page

_BUFFER_BYTES = 2 << 20
_STRIDE_BYTES = 64 << 10
_ZERO_STRIDE = bytes(_STRIDE_BYTES)
_ZERO_BLOCK = bytes(BLOCK_BYTES)


class TooLong(Exception):
    """More bytes came than were announced."""


class Hasher(Protocol):
    """What hashlib's objects can do."""

    def update(self, data: memoryview, /) -> None: ...


class SparseWriter:
    """Writes one stream into a new (all zero) file, at each of `offsets`.

    Fill space(), then commit() what was filled, or skip() zeros; finish() writes the rest. Blocks
    of 4 KiB that lie aligned on the disk and hold only zeros are left out. Raises TooLong before
    anything past `limit` bytes is written. With `beside`, which runs one task at a time, a full
    buffer is written there while the next one is filled; its end must be waited for whatever
    happens.
    """

    def __init__(
        self,
        disk: DiskFile,
        offsets: Sequence[int],
        limit: int,
        hasher: Hasher | None = None,
        beside: Executor | None = None,
    ) -> None:
        self._disk = disk
        self._offsets = offsets
        self._limit = limit
        self._hasher = hasher
        self._beside = beside
        self._pending: Future[None] | None = None
        self._buffer = _Buffer()
        self._other = _Buffer() if beside else self._buffer
        self._done = 0
        self._begin_piece()

    @property
    def count(self) -> int:
        """The bytes committed so far."""
        return self._done + self._fill - self._start

    @property
    def left(self) -> int:
        """The bytes that may still come."""
        return self._limit - self.count

    def space(self) -> memoryview:
        """Where the next bytes go; never empty."""
        return self._buffer.view[self._fill :]

    def commit(self, count: int) -> None:
        """Take the first `count` bytes of space()."""
        self._fill += count
        if self.count > self._limit:
            raise TooLong
        if self._fill == len(self._buffer.view):
            self._flush()

    def skip(self, count: int) -> None:
        """Let `count` bytes stay zero, at most `left`. They are not hashed."""
        if count:
            self._flush()
            self._done += count
            self._begin_piece()

    def finish(self) -> int:
        """Write what is left; returns the length of the stream."""
        self._flush()
        self._wait_written()
        return self._done

    def _begin_piece(self) -> None:
        # Blocks of the disk lie in pages of the memory.
        self._start = self._fill = (self._offsets[0] + self._done) % BLOCK_BYTES

    def _flush(self) -> None:
        piece = self._buffer, self._start, self._fill, self._done
        if self._beside is None:
            self._write_piece(*piece)
        else:
            self._wait_written()
            self._pending = self._beside.submit(self._write_piece, *piece)
            self._buffer, self._other = self._other, self._buffer
        self._done += self._fill - self._start
        self._begin_piece()

    def _wait_written(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _write_piece(self, buffer: _Buffer, start: int, fill: int, done: int) -> None:
        """Write buffer.view[start:fill], which lies at `done` in the stream."""
        if self._hasher is not None:
            self._hasher.update(buffer.view[start:fill])
        first = buffer.first
        for at, end in find_data(buffer.content, first + start, first + fill, -first):
            data = buffer.content_view[at:end]
            for offset in self._offsets:
                place = offset + done + at - first - start
                in_step = (place - (at - first)) % BLOCK_BYTES == 0
                self._disk.write(data, place, in_step=in_step)


class _Buffer:
    """view begins at a page of memory."""

    def __init__(self) -> None:
        self.content = bytearray(_BUFFER_BYTES + BLOCK_BYTES)
        self.first = find_page(self.content)
        self.content_view = memoryview(self.content)
        self.view = self.content_view[self.first :][:_BUFFER_BYTES]


def find_data(
    buffer: bytearray, start: int, end: int, disk_offset: int
) -> Iterator[tuple[int, int]]:
    """The runs of buffer[start:end] that are not zero in whole blocks of the disk.

    disk_offset: where buffer[0] belongs, of which only the place in a block counts.
    """
    run = start
    for at, until in _find_zeros(buffer, start, end, disk_offset):
        if run < at:
            yield run, at
        run = until
    if run < end:
        yield run, end


def _find_zeros(
    buffer: bytearray, start: int, end: int, disk_offset: int
) -> Iterator[tuple[int, int]]:
    """The blocks of zeros, one or several at once; a part of one at each end counts, too.

    Of all blocks only the first word is looked at, in one call: 0.02 ms for a MiB. startswith
    then compares in place (memcmp).
    """
    first = min(end, start + -(disk_offset + start) % BLOCK_BYTES)
    last = max(first, end - (disk_offset + end) % BLOCK_BYTES)
    if start < first and _is_zero(buffer, start, first):
        yield start, first
    words = memoryview(buffer)[first:last].cast("Q")[:: BLOCK_BYTES // 8].tolist()
    at = first
    with contextlib.suppress(ValueError):  # no further one
        while True:
            at = first + words.index(0, (at - first) // BLOCK_BYTES) * BLOCK_BYTES
            until = at + BLOCK_BYTES
            if at + _STRIDE_BYTES <= last and buffer.startswith(_ZERO_STRIDE, at):
                until = at + _STRIDE_BYTES
            if until > at + BLOCK_BYTES or buffer.startswith(_ZERO_BLOCK, at):
                yield at, until
            at = until
    if last < end and _is_zero(buffer, last, end):
        yield last, end


def _is_zero(buffer: bytearray, start: int, end: int) -> bool:
    return buffer.startswith(_ZERO_BLOCK[: end - start], start)
