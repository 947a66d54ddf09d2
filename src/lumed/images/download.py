"""One file from a mirror: resumed where an earlier try ended, and only handed out verified.

    <blobs>/<algorithm>/<hex>    the file while it is fetched, under the sum that it must have

Its bytes are believed only after they were hashed, also those that are found there.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin

from lumed.claim import RunLock, take_lock
from lumed.errors import RegistryFailed
from lumed.files import check_free_space, full_disk_is_no_space, write_all
from lumed.images.connection import Connection, parse_url
from lumed.images.oci import ConnectionLost
from lumed.threads import Stopped

_CHUNK_BYTES = 1 << 20
_QUIET_S = 30.0
_TRIES = 5
_FIRST_PAUSE_S = 0.1
_LOOK_EVERY_S = 0.2
_REPORT_EVERY_S = 0.1
_MOST_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")

Report = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class VendorSum:
    """What a file must hash to; algorithm is hashlib's name."""

    algorithm: str
    hex: str


def fetch_text(url: str, limit: int, *, stop: threading.Event) -> str:
    """A small text. Raises RegistryFailed, also for more than limit bytes, and Stopped."""
    for pause_s in _pauses():
        try:
            with _open(url, 0, stop) as (connection, reply):
                return connection.read_small(reply, limit).decode(errors="replace")
        except ConnectionLost:
            if pause_s is None:
                raise
            _pause(pause_s, stop)
    raise AssertionError


def download(
    url: str, wanted: VendorSum, blobs: Path, target: Path, *, stop: threading.Event, report: Report
) -> None:
    """Put the verified file at `target`, which does not exist yet.

    report gets bytes done and to do (0: unknown). Raises RegistryFailed if the mirror fails or
    the sum is wrong, NoSpace, and Stopped soon after `stop` is set. What was fetched until then
    stays in `blobs`, unless it was wrong.
    """
    path = blobs / wanted.algorithm / wanted.hex
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with full_disk_is_no_space(blobs, "fetch the image"):
        lock = _take(path, stop)
        try:
            _Download(url, wanted, lock.fd, path, stop, report).run()
            _move(path, target)
        finally:
            lock.close()


def _take(path: Path, stop: threading.Event) -> RunLock:
    """The partial file, ours alone; another server that fetches it is waited for."""
    while True:
        lock = take_lock(path)
        # Its last owner may have moved it away between our opening and our locking it.
        if lock is not None and os.fstat(lock.fd).st_nlink:
            return lock
        if lock is not None:
            lock.close()
        else:
            _pause(_LOOK_EVERY_S, stop)


def _move(path: Path, target: Path) -> None:
    try:
        path.rename(target)
    except OSError:
        # The cache's two folders are on one file system unless somebody mounted one of them.
        shutil.copyfile(path, target)
        path.unlink()


class _Download:
    def __init__(
        self,
        url: str,
        wanted: VendorSum,
        fd: int,
        path: Path,
        stop: threading.Event,
        report: Report,
    ) -> None:
        self._url = url
        self._wanted = wanted
        self._fd = fd
        self._path = path
        self._stop = stop
        self._report = report
        self._reported_at = 0.0
        self._buffer = memoryview(bytearray(_CHUNK_BYTES))
        self._hasher = hashlib.new(wanted.algorithm)
        self._at = 0

    def run(self) -> None:
        found = os.fstat(self._fd).st_size
        self._hash_found(found)
        if found and self._is_right():
            return  # killed between the last byte and the move
        self._fetch()
        if self._is_right():
            return
        if found:
            # Most likely what was found was wrong, or of a file that the vendor has replaced.
            self._restart()
            self._fetch()
            if self._is_right():
                return
        self._path.unlink()
        raise RegistryFailed(
            f"{self._url} does not have the {self._wanted.algorithm} sum that its vendor names: "
            f"{self._hasher.hexdigest()} instead of {self._wanted.hex}",
            hint="try again later; a mirror may be in the middle of an update",
        )

    def _is_right(self) -> bool:
        return self._hasher.hexdigest() == self._wanted.hex

    def _hash_found(self, found: int) -> None:
        while self._at < found:
            self._check()
            count = os.preadv(self._fd, [self._buffer], self._at)
            if count == 0:
                return
            self._hasher.update(self._buffer[:count])
            self._at += count

    def _restart(self) -> None:
        os.ftruncate(self._fd, 0)
        self._hasher = hashlib.new(self._wanted.algorithm)
        self._at = 0

    def _fetch(self) -> None:
        """To the end, over cut lines as long as each try brings something."""
        pauses = _pauses()
        while True:
            before = self._at
            try:
                self._fetch_rest()
                return
            except ConnectionLost:
                if self._at > before:
                    pauses = _pauses()
                pause_s = next(pauses)
                if pause_s is None:
                    raise
                _pause(pause_s, self._stop)

    def _fetch_rest(self) -> None:
        with _open(self._url, self._at, self._stop) as (connection, reply):
            if reply.status == 416:
                if self._at == 0:
                    raise RegistryFailed(f"{self._url} sends nothing")
                return  # nothing follows what there is: the sum will tell
            total = self._start(reply)
            while count := connection.read_into(reply, self._buffer):
                self._check()
                self._hasher.update(self._buffer[:count])
                write_all(self._fd, self._buffer[:count], self._at)
                self._at += count
                self._moved(total)
            if reply.length or (total and self._at < total):
                raise connection.lost(f"broke off after {self._at} of {total} bytes")
            self._report(self._at, total or self._at)

    def _start(self, reply: http.client.HTTPResponse) -> int:
        """Where the reply begins must be where we are; returns the file's length or 0."""
        length = reply.length or 0
        total = 0
        if reply.status == 206:
            told = _RANGE.fullmatch(reply.headers.get("Content-Range", ""))
            if told is None or int(told[1]) != self._at:
                raise RegistryFailed(f"{self._url} sends another part than it was asked for")
            total = 0 if told[2] == "*" else int(told[2])
        elif self._at:
            self._restart()  # it does not know Range
        total = total or (self._at + length if length else 0)
        if total:
            check_free_space(self._path.parent, total - self._at, "fetch the image")
        return total

    def _moved(self, total: int) -> None:
        now = time.monotonic()
        if now - self._reported_at >= _REPORT_EVERY_S:
            self._reported_at = now
            self._report(self._at, total)

    def _check(self) -> None:
        if self._stop.is_set():
            raise Stopped


@contextlib.contextmanager
def _open(
    url: str, offset: int, stop: threading.Event
) -> Iterator[tuple[Connection, http.client.HTTPResponse]]:
    """A reply of 200, 206 or 416, after redirects; ConnectionLost is worth another try."""
    for _ in range(_MOST_REDIRECTS + 1):
        origin, target = parse_url(url)
        connection = Connection(origin, stop=stop, quiet_s=_QUIET_S)
        try:
            headers = {"Range": f"bytes={offset}-"} if offset else {}
            connection.send("GET", target, headers)
            reply = connection.receive()
            location = reply.headers.get("Location")
            if reply.status in _REDIRECTS and location:
                url = _follow(url, location)
                continue
            if reply.status in (200, 206) or (reply.status == 416 and offset):
                yield connection, reply
                return
            raise _refused(url, reply.status)
        finally:
            connection.close()
    raise RegistryFailed(f"{url} redirects more than {_MOST_REDIRECTS} times")


def _follow(url: str, location: str) -> str:
    new = urljoin(url, location)
    if url.startswith("https:") and not new.startswith("https:"):
        raise RegistryFailed(f"{url} redirects to {new:.200}, which is not encrypted")
    return new


def _refused(url: str, status: int) -> RegistryFailed:
    if status == 404:
        return RegistryFailed(
            f"{url} does not exist",
            hint="is the mirror complete, and the catalog's entry up to date?",
        )
    if status == 429 or status >= 500:
        return ConnectionLost(f"{url} answers with status {status}")
    return RegistryFailed(f"{url} answers with status {status}")


def _pauses() -> Iterator[float | None]:
    """How long to wait before each further try; then None."""
    yield from (_FIRST_PAUSE_S * 2**number for number in range(1, _TRIES))
    while True:
        yield None


def _pause(seconds: float, stop: threading.Event) -> None:
    if stop.wait(seconds):
        raise Stopped
