"""Blobs on their way: files by digest, appended to and hashed as they come, resumed after a kill.

    <directory>/sha256/<hex>    shorter than the blob: partial. Its bytes are believed only after
                                they were hashed, by everybody who finds them.

Two locks on each file (fcntl(2), open file description locks, gone with their holder):
byte 0, exclusive: who appends. Byte 1, shared: who uses the file; it is not removed then.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from lumed.claim import try_lock_byte
from lumed.errors import RegistryFailed
from lumed.files import full_disk_is_no_space, write_all
from lumed.images.oci import ConnectionLost, Descriptor

_CHUNK_BYTES = 1 << 20
_LOOK_EVERY_S = 0.2
_TRIES = 5
_FIRST_PAUSE_S = 0.1
_APPENDING, _USING = 0, 1


class BlobStream(Protocol):
    """The bytes of a blob from `offset` on: what was asked for, or 0 if Range was ignored."""

    @property
    def offset(self) -> int: ...

    def readinto(self, buffer: memoryview, /) -> int:
        """Read some bytes, 0 at the end. Raises ConnectionLost or RegistryFailed."""


class BlobSource(Protocol):
    """Where blobs come from. Reads end with an exception soon after the caller's stop is set."""

    def get_blob(self, blob: Descriptor) -> bytes:
        """A small blob, whole and verified."""

    def open_blob(self, blob: Descriptor, offset: int) -> AbstractContextManager[BlobStream]:
        """The blob from `offset` on. ConnectionLost, here or while reading: worth a retry."""


class BlobFile:
    """One blob, fetched by one thread (fetch) while another reads what is there (open_reader)."""

    def __init__(self, blob: Descriptor, path: Path, check: Callable[[], None]) -> None:
        """check is called at least every second while something is waited for; it may raise."""
        self.blob = blob
        self.done_bytes = 0
        self._path = path
        self._check = check
        self._changed = threading.Condition()
        self._readable = 0
        self._complete = False
        self._failure: BaseException | None = None
        self._fd = -1

    @contextlib.contextmanager
    def open(self) -> Iterator[int]:
        """Open the file and keep it from being removed; the descriptor is for reading."""
        while True:
            self._fd = os.open(
                self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
            )
            try:
                self._lock(fcntl.F_RDLCK, _USING)
                # Somebody may have removed the file between our opening and our locking it.
                if os.fstat(self._fd).st_nlink:
                    yield self._fd
                    return
            finally:
                os.close(self._fd)

    def fetch(self, source: BlobSource, moved: Callable[[], None]) -> None:
        """Complete the file; errors are also given to the reader. moved follows done_bytes."""
        try:
            with full_disk_is_no_space(self._path.parent, "keep the image's blobs"):
                self._lock(fcntl.F_WRLCK, _APPENDING)
                try:
                    self._complete_file(source, moved)
                finally:
                    self._unlock(_APPENDING)
            self._publish(self.blob.size_bytes, complete=True)
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()
            raise

    def wait_readable(self, end: int) -> int:
        """Wait until bytes before `end` can be read, or all; returns how many there are."""
        end = min(end, self.blob.size_bytes)
        with self._changed:
            while self._readable < end:
                if self._failure is not None:
                    raise self._failure
                self._check()
                self._changed.wait(_LOOK_EVERY_S)
            return self._readable

    def wait_complete(self) -> None:
        """Wait until the file is whole and its digest right. Raises what fetch raised."""
        with self._changed:
            while not self._complete:
                if self._failure is not None:
                    raise self._failure
                self._check()
                self._changed.wait(_LOOK_EVERY_S)

    def open_reader(self) -> io.RawIOBase:
        """A stream over the blob that waits for bytes that are still to come."""
        return _Tail(self, self._fd)

    def _complete_file(self, source: BlobSource, moved: Callable[[], None]) -> None:
        size = self.blob.size_bytes
        found = os.fstat(self._fd).st_size
        if found <= size:
            hasher = self._hash_found(found, moved)
            # A reader sees resumed bytes only at the end: what is unpacked cannot be taken back.
            self._append(source, hasher, found, moved, readable=found == 0)
            if f"sha256:{hasher.hexdigest()}" == self.blob.digest:
                return
        if found:
            os.ftruncate(self._fd, 0)
            hasher = hashlib.sha256()
            self._append(source, hasher, 0, moved, readable=True)
            if f"sha256:{hasher.hexdigest()}" == self.blob.digest:
                return
        os.ftruncate(self._fd, 0)
        raise RegistryFailed(
            f"The registry sent wrong bytes for the blob {self.blob.digest}",
            hint="try again; if it stays so, the image is damaged at the registry",
        )

    def _hash_found(self, found: int, moved: Callable[[], None]) -> hashlib._Hash:
        hasher = hashlib.sha256()
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        at = 0
        while at < found:
            self._check()
            count = os.preadv(self._fd, [buffer[: found - at]], at)
            if count == 0:
                break  # cut off by somebody meanwhile: the digest will tell
            hasher.update(buffer[:count])
            at += count
            self.done_bytes = at
            moved()
        return hasher

    def _append(
        self,
        source: BlobSource,
        hasher: hashlib._Hash,
        at: int,
        moved: Callable[[], None],
        *,
        readable: bool,
    ) -> None:
        """Fetch from `at` to the end, over cut lines as long as each try brings something."""
        size = self.blob.size_bytes
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        tries = 0
        while at < size:
            before = at
            try:
                with source.open_blob(self.blob, at) as stream:
                    self._skip(stream, at, buffer)
                    while at < size:
                        self._check()
                        count = stream.readinto(buffer[: size - at])
                        if count == 0:
                            raise RegistryFailed(
                                f"The registry sent {at} of {size} bytes of the blob "
                                f"{self.blob.digest}"
                            )
                        hasher.update(buffer[:count])
                        write_all(self._fd, buffer[:count], at)
                        at += count
                        self.done_bytes = at
                        if readable:
                            self._publish(at)
                        moved()
                    self._check_ended(stream, buffer)
            except ConnectionLost:
                tries = 1 if at > before else tries + 1
                if tries >= _TRIES:
                    raise
                self._pause(_FIRST_PAUSE_S * 2**tries)

    def _skip(self, stream: BlobStream, at: int, buffer: memoryview) -> None:
        """Read over what a server sends again that does not know Range."""
        left = at - stream.offset
        if left < 0:
            raise RegistryFailed(
                f"The registry sent the blob {self.blob.digest} from {stream.offset} on "
                f"instead of from {at}"
            )
        while left:
            self._check()
            count = stream.readinto(buffer[:left])
            if count == 0:
                raise RegistryFailed(f"The registry sent the blob {self.blob.digest} cut short")
            left -= count

    def _check_ended(self, stream: BlobStream, buffer: memoryview) -> None:
        with contextlib.suppress(ConnectionLost):  # nothing was lost with it
            if stream.readinto(buffer[:1]):
                raise RegistryFailed(
                    f"The registry sent more than the {self.blob.size_bytes} bytes of the blob "
                    f"{self.blob.digest}"
                )

    def _publish(self, readable: int, *, complete: bool = False) -> None:
        with self._changed:
            self._readable = readable
            self._complete = complete
            self._changed.notify_all()

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._check()
            time.sleep(min(left, _LOOK_EVERY_S))

    def _lock(self, kind: int, byte: int) -> None:
        """Take a lock as soon as others have left it; their own waits have deadlines."""
        while not try_lock_byte(self._fd, kind, byte):
            self._pause(_LOOK_EVERY_S)

    def _unlock(self, byte: int) -> None:
        try_lock_byte(self._fd, fcntl.F_UNLCK, byte)


class _Tail(io.RawIOBase):
    def __init__(self, file: BlobFile, fd: int) -> None:
        self._file = file
        self._tail_fd = fd
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        readable = self._file.wait_readable(self._at + 1)
        count = os.preadv(self._tail_fd, [view[: readable - self._at]], self._at)
        self._at += count
        return count


def get_blob_path(directory: Path, blob: Descriptor) -> Path:
    """Where the blob's file is, or would be."""
    return directory / "sha256" / blob.hex


def count_found(directory: Path, blob: Descriptor) -> int:
    """The bytes of the blob that are there already, unverified."""
    try:
        return min(get_blob_path(directory, blob).stat().st_size, blob.size_bytes)
    except FileNotFoundError:
        return 0


def drop_blob(directory: Path, blob: Descriptor) -> None:
    """Remove the blob's file unless somebody uses it."""
    _drop_idle(get_blob_path(directory, blob), dry_run=False)


def drop_idle_blobs(
    directory: Path, *, dry_run: bool = False, untouched_s: float | None = None
) -> int:
    """Remove what nobody uses, of whatever kind of sum; the bytes that this frees, or would.

    untouched_s: only what nobody has written to for so long.
    """
    before = None if untouched_s is None else time.time() - untouched_s
    return sum(
        _drop_idle(path, dry_run=dry_run, before=before) for path in directory.glob("sha*/*")
    )


def _drop_idle(path: Path, *, dry_run: bool, before: float | None = None) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        if before is not None and os.fstat(fd).st_mtime >= before:
            return 0
        if not try_lock_byte(fd, fcntl.F_WRLCK, _USING):
            return 0
        if not dry_run:
            path.unlink(missing_ok=True)
        return os.fstat(fd).st_blocks * 512
    finally:
        os.close(fd)
