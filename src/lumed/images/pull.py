"""From a plan to a verified disk file: several blobs at once, each unpacked while it arrives.

For each blob one thread fetches, hashes and appends to its file, and another reads the file
behind it, unpacks and writes the disk: the file is the queue between them, so neither memory nor
a slow side limits the other.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from lumed.errors import RegistryFailed
from lumed.files import check_free_space, full_disk_is_no_space
from lumed.images.blobs import (
    BlobFile,
    BlobSource,
    BlobStream,
    count_found,
    drop_blob,
    get_blob_path,
)
from lumed.images.copy import Stopped
from lumed.images.decode import (
    HEAD_BYTES,
    MAX_WINDOW_BYTES,
    USUAL_WINDOW_BYTES,
    BadData,
    Decoder,
    check_zstd_end,
    find_compression,
    open_decoder,
    read_window,
)
from lumed.images.formats.plan import Compression, DiskPart, ImagePlan
from lumed.images.oci import Descriptor
from lumed.images.qcow2 import MAX_VIRTUAL_BYTES
from lumed.images.sparse import SparseWriter, TooLong

__all__ = [
    "BlobSource",
    "BlobStream",
    "Stopped",
    "drop_blobs",
    "needed_bytes",
    "pull_disk",
]

_BLOBS_AT_ONCE = 2
_REPORT_EVERY_S = 0.1

Report = Callable[[int, int], None]


def needed_bytes(plan: ImagePlan, blobs: Path) -> int:
    """The space that a pull surely takes: the blobs not there yet, and their content again.

    What a blob unpacks to without its zeros is not told anywhere; it is at least the blob.
    """
    return _missing_bytes(plan, blobs) + _least_disk_bytes(plan)


def pull_disk(
    source: BlobSource,
    plan: ImagePlan,
    blobs: Path,
    target: Path,
    *,
    stop: threading.Event,
    report: Report,
) -> None:
    """Make the new file `target` from the blobs of `plan`; every digest was right at return.

    `blobs` keeps what arrived, for the next try or until drop_blobs. report gets the bytes of
    blobs fetched or found, and all; from any thread. Raises Stopped soon after `stop` is set,
    NoSpace (before the first byte if it is sure), RegistryFailed for what the registry did. A
    target that failed is left behind, half written; one that succeeded is not yet synced.
    """
    (blobs / "sha256").mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_space(plan, blobs, target)
    with full_disk_is_no_space(target.parent, "write the image's disk"):
        fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, plan.disk_bytes or 0)
            _Pull(source, plan, blobs, fd, stop, report).run()
        finally:
            os.close(fd)


def drop_blobs(plan: ImagePlan, blobs: Path) -> None:
    """Remove the plan's blobs, except those that another pull uses at this moment."""
    for blob in plan.blobs:
        drop_blob(blobs, blob)


def _missing_bytes(plan: ImagePlan, blobs: Path) -> int:
    return sum(blob.size_bytes - count_found(blobs, blob) for blob in plan.blobs)


def _least_disk_bytes(plan: ImagePlan) -> int:
    return sum(blob.size_bytes for blob in plan.blobs)


def _check_space(plan: ImagePlan, blobs: Path, target: Path) -> None:
    what = "pull the image"
    if blobs.stat().st_dev == target.parent.stat().st_dev:
        check_free_space(blobs, needed_bytes(plan, blobs), what)
    else:
        check_free_space(blobs, _missing_bytes(plan, blobs), what)
        check_free_space(target.parent, _least_disk_bytes(plan), what)


class _Pull:
    def __init__(
        self,
        source: BlobSource,
        plan: ImagePlan,
        blobs: Path,
        fd: int,
        stop: threading.Event,
        report: Report,
    ) -> None:
        self._source = source
        self._plan = plan
        self._fd = fd
        self._stop = stop
        self._failure: BaseException | None = None
        self._report = report
        self._files = {
            blob.digest: BlobFile(blob, get_blob_path(blobs, blob), self._check)
            for blob in plan.blobs
        }
        self._total = sum(blob.size_bytes for blob in plan.blobs)
        self._reported_at = 0.0
        self._reporting = threading.Lock()
        self._wide_window = threading.Lock()

    def run(self) -> None:
        self._run_placed()
        if self._stop.is_set():
            raise Stopped
        if self._failure is not None:
            raise self._failure
        self._report(self._total, self._total)

    def _run_placed(self) -> None:
        """All offsets are known: any order, each blob unpacked once for all of its parts."""
        uses: dict[str, list[DiskPart]] = {}
        for part in self._plan.parts:
            uses.setdefault(part.blob.digest, []).append(part)
        with ThreadPoolExecutor(_BLOBS_AT_ONCE, thread_name_prefix="unpack") as pool:
            jobs = [pool.submit(self._take_blob, parts) for parts in uses.values()]
            try:
                for job in as_completed(jobs):
                    job.result()
            except BaseException as error:
                self._fail(error)
                pool.shutdown(cancel_futures=True)

    def _take_blob(self, parts: Sequence[DiskPart]) -> int:
        """Fetch one blob and unpack it to each of its places; returns its unpacked length."""
        file = self._files[parts[0].blob.digest]
        with file.open() as fd:
            fetcher = threading.Thread(target=self._fetch, args=(file,), name="fetch")
            fetcher.start()
            try:
                try:
                    return self._unpack(file, fd, parts)
                except (BadData, TooLong) as error:
                    file.wait_complete()  # if the bytes were wrong, that is the error
                    raise _refuse(parts[0].blob, error) from error
            except BaseException as error:
                self._fail(error)
                raise
            finally:
                fetcher.join()

    def _fetch(self, file: BlobFile) -> None:
        with contextlib.suppress(BaseException):  # the reader of the file raises it
            file.fetch(self._source, self._moved)

    def _unpack(self, file: BlobFile, fd: int, parts: Sequence[DiskPart]) -> int:
        told = {(part.size_bytes, part.content_digest) for part in parts}
        if len(told) > 1:
            raise BadData("its parts are to have different contents")
        size, digest = told.pop()
        offsets = [part.offset or 0 for part in parts]
        file.wait_readable(HEAD_BYTES)
        head = os.pread(fd, HEAD_BYTES, 0)
        compression = parts[0].compression or find_compression(head)
        hasher = hashlib.sha256() if digest and compression is not Compression.ZSTD else None
        limit = MAX_VIRTUAL_BYTES - max(offsets) if size is None else size
        writer = SparseWriter(self._fd, offsets, limit, hasher)
        window = USUAL_WINDOW_BYTES
        if compression is Compression.ZSTD and read_window(head) > window:
            with self._wide_window:
                decoder = open_decoder(file.open_reader(), compression, MAX_WINDOW_BYTES)
                self._copy(decoder, writer)
                del decoder
        else:
            self._copy(open_decoder(file.open_reader(), compression, window), writer)
        count = writer.finish()
        file.wait_complete()
        if compression is Compression.ZSTD:
            check_zstd_end(fd, file.blob.size_bytes)
        if size is not None and count != size:
            raise BadData(f"it unpacks to {count} bytes and not to the {size} that were announced")
        if hasher is not None and f"sha256:{hasher.hexdigest()}" != digest:
            raise BadData(f"its content is not {digest}, as was announced")
        return count

    def _copy(self, decoder: Decoder, writer: SparseWriter) -> None:
        while count := decoder.readinto(writer.space()):
            writer.commit(count)
            self._check()

    def _check(self) -> None:
        if self._stop.is_set() or self._failure is not None:
            raise Stopped

    def _fail(self, error: BaseException) -> None:
        """Keep the first failure: it makes the others stop, which is then no news."""
        if self._failure is None:
            self._failure = error

    def _moved(self) -> None:
        now = time.monotonic()
        with self._reporting:
            if now - self._reported_at < _REPORT_EVERY_S:
                return
            self._reported_at = now
            self._report(sum(file.done_bytes for file in self._files.values()), self._total)


def _refuse(blob: Descriptor, error: Exception) -> RegistryFailed:
    reason = "it unpacks to more than was announced" if isinstance(error, TooLong) else str(error)
    return RegistryFailed(f"The image is damaged at its blob {blob.digest}: {reason}")
