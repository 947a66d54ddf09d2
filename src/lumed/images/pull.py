"""From a plan to a verified disk file: several blobs at once, each unpacked while it arrives.

For each blob one thread fetches, hashes and appends to its file, and another reads the file
behind it, unpacks and writes the disk: the file is the queue between them, so neither memory nor
a slow side limits the other.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from lumed.errors import NoSpace, RegistryFailed
from lumed.files import check_free_space, full_disk_is_no_space
from lumed.images.blobs import (
    BlobFile,
    BlobSource,
    count_found,
    drop_blob,
    get_blob_path,
)
from lumed.images.decode import (
    HEAD_BYTES,
    MAX_WINDOW_BYTES,
    USUAL_WINDOW_BYTES,
    BadData,
    Decoder,
    find_compression,
    open_decoder,
    read_window,
)
from lumed.images.diskfile import DiskFile
from lumed.images.formats.plan import Compression, DiskPart, ImagePlan
from lumed.images.oci import Descriptor
from lumed.images.qcow2 import MAX_VIRTUAL_BYTES
from lumed.images.sparse import Hasher, SparseWriter, TooLong
from lumed.images.tar import TarDisk
from lumed.threads import Stopped
from lumed.units import describe_size

# Unpacking takes a core each; more than four only take turns at the disk and the line.
BLOBS_AT_ONCE = max(2, min(4, os.cpu_count() or 2))
_REPORT_EVERY_S = 0.1

T = TypeVar("T")
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
            _set_size(fd, plan.disk_bytes or 0, target)
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


def _set_size(fd: int, size: int, target: Path) -> None:
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        raise NoSpace(
            f"The file system of {target.parent} cannot hold a file of {describe_size(size)}",
            hint="choose another storage",
        ) from error


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
        self._blobs = blobs
        self._fd = fd
        self._disk = DiskFile(fd)
        self._stop = stop
        self._failure: BaseException | None = None
        self._report = report
        self._files: dict[str, BlobFile] = {}
        self._total = sum(blob.size_bytes for blob in plan.blobs)
        self._reported_at = 0.0
        self._reporting = threading.Lock()
        self._wide_window = threading.Lock()

    def run(self) -> None:
        try:
            if self._plan.in_tar:
                self._run_tar()
            elif any(part.offset is None for part in self._plan.parts):
                self._run_in_order()
            else:
                self._run_placed()
        except BaseException as error:
            self._fail(error)
        finally:
            self._disk.close()
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
        with ThreadPoolExecutor(BLOBS_AT_ONCE, thread_name_prefix="unpack") as pool:
            jobs = [pool.submit(self._take_blob, blob_parts) for blob_parts in uses.values()]
            try:
                ends = [job.result() for job in as_completed(jobs)]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        os.ftruncate(self._fd, max(ends))  # zeros at the end were not written

    def _run_in_order(self) -> None:
        """Some offset is known only once the parts before are unpacked."""
        at = 0
        for part in self._plan.parts:
            at = self._take_blob([replace(part, offset=at)])
        os.ftruncate(self._fd, at)
        if self._plan.disk_bytes not in (None, at):
            raise RegistryFailed(
                f"The image's disk has {at} bytes and should have {self._plan.disk_bytes}"
            )

    def _run_tar(self) -> None:
        if not any(self._use_blob(part.blob, self._unpack_tar) for part in self._plan.parts):
            raise RegistryFailed(
                "The image has no file in disk/, so it is no container disk",
                hint="lumed runs disks of machines; a container's image has none",
            )

    def _take_blob(self, parts: Sequence[DiskPart]) -> int:
        """Fetch one blob and unpack it to each of its places; returns where the last one ends."""
        return self._use_blob(parts[0].blob, lambda file, fd: self._unpack_parts(file, fd, parts))

    def _use_blob(self, blob: Descriptor, unpack: Callable[[BlobFile, int], T]) -> T:
        """Unpack a blob while it is fetched; returns once both are done and right."""
        # Anew for each use: between two of them somebody may have removed the file.
        file = BlobFile(blob, get_blob_path(self._blobs, blob), self._check)
        self._files[blob.digest] = file
        try:
            with file.open() as fd:
                fetcher = threading.Thread(target=self._fetch, args=(file,), name="fetch")
                fetcher.start()
                try:
                    return unpack(file, fd)
                except (BadData, TooLong) as error:
                    file.wait_complete()  # if the bytes were wrong, that is the error
                    raise _refuse(blob, error) from error
                except BaseException as error:
                    self._fail(error)  # now, so that the fetcher ends
                    raise
                finally:
                    fetcher.join()
        except BaseException as error:
            self._fail(error)
            raise

    def _fetch(self, file: BlobFile) -> None:
        with contextlib.suppress(BaseException):  # the reader of the file raises it
            file.fetch(self._source, self._moved)

    @contextlib.contextmanager
    def _open_content(
        self, file: BlobFile, fd: int, compression: Compression | None
    ) -> Iterator[tuple[Decoder, Compression]]:
        """The unpacked content of a blob; leaving it waits until the whole blob is verified."""
        file.wait_readable(HEAD_BYTES)
        head = os.pread(fd, HEAD_BYTES, 0)
        kind = compression or find_compression(head)
        is_wide = kind is Compression.ZSTD and read_window(head) > USUAL_WINDOW_BYTES
        # One wide window at a time, or several blobs take more memory than a pull should.
        with self._wide_window if is_wide else contextlib.nullcontext():
            window = MAX_WINDOW_BYTES if is_wide else USUAL_WINDOW_BYTES
            yield open_decoder(file.open_reader(), kind, window), kind
        file.wait_complete()

    def _unpack_parts(self, file: BlobFile, fd: int, parts: Sequence[DiskPart]) -> int:
        told = {(part.size_bytes, part.content_digest) for part in parts}
        if len(told) > 1:
            raise BadData("its parts are to have different contents")
        size, digest = told.pop()
        offsets = [part.offset or 0 for part in parts]
        limit = MAX_VIRTUAL_BYTES - max(offsets) if size is None else size
        with self._open_content(file, fd, parts[0].compression) as (decoder, kind):
            hasher = hashlib.sha256() if digest and kind is not Compression.ZSTD else None
            count = self._copy(decoder, offsets, limit, hasher)
        if size is not None and count != size:
            raise BadData(f"it unpacks to {count} bytes and not to the {size} that were announced")
        if hasher is not None and f"sha256:{hasher.hexdigest()}" != digest:
            raise BadData(f"its content is not {digest}, as was announced")
        return max(offsets) + count

    def _unpack_tar(self, file: BlobFile, fd: int) -> bool:
        with self._open_content(file, fd, None) as (decoder, _):
            archive = TarDisk(decoder)
            size = archive.find()
            if size is not None:
                os.ftruncate(self._fd, size)
                self._copy(archive, [0], size)
            archive.check_rest()
        return size is not None

    def _copy(
        self,
        decoder: Decoder,
        offsets: Sequence[int],
        limit: int,
        hasher: Hasher | None = None,
    ) -> int:
        """Unpack to the disk at each offset; returns the length."""
        with ThreadPoolExecutor(1, thread_name_prefix="write") as beside:
            writer = SparseWriter(self._disk, offsets, limit, hasher, beside)
            while count := decoder.readinto(writer.space()):
                writer.commit(count)
                if hasher is None:
                    writer.skip(decoder.take_zeros(writer.left))
                self._check()
            return writer.finish()

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
            self._report(sum(file.done_bytes for file in list(self._files.values())), self._total)


def _refuse(blob: Descriptor, error: Exception) -> RegistryFailed:
    reason = "it unpacks to more than was announced" if isinstance(error, TooLong) else str(error)
    return RegistryFailed(f"The image is damaged at its blob {blob.digest}: {reason}")
