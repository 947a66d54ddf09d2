"""From a stopped VM's disk to a registry, as a Lume image or as a container disk.

The disk is cut into slices; each becomes a gzip file in a scratch directory, is sent, and is
removed: three slices are under way at a time, so that one is sent while others are compressed.
What a slice became is recorded before it is sent. So a push that follows an interrupted one
leaves out what the registry has, and does not even read it; the slices that were under way are
compressed again, to the same bytes.
"""

from __future__ import annotations

import contextlib
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from heapq import nlargest
from pathlib import Path
from typing import Protocol

from lumed.errors import InvalidField
from lumed.files import check_free_space, full_disk_is_no_space
from lumed.images import manifests
from lumed.images.diskmap import BLOCK_BYTES, DiskMap, read_map
from lumed.images.flatqcow2 import FlatQcow2
from lumed.images.formats import lume
from lumed.images.gzipper import Gzipper, Piece
from lumed.images.manifests import PushedSlice, PushSource
from lumed.images.nbd import DiskReader, open_disk
from lumed.images.oci import (
    MAX_LAYERS,
    MAX_MANIFEST_BYTES,
    OCI_CONFIG,
    OCI_MANIFEST,
    Descriptor,
    digest_of,
)
from lumed.images.pushrecord import PushRecord
from lumed.images.reference import ImageReference
from lumed.images.staging import Staging, sweep_staging
from lumed.model.request import PushFormat
from lumed.osproc import run_tool_blocking
from lumed.threads import Stopped
from lumed.units import MIB

DEFAULT_CHUNK_BYTES = 512 * MIB
_SLICES_AT_ONCE = 3
_STAGE = "pushing"
_NO_DIGEST = f"sha256:{'0' * 64}"
# Lume knows no VM without nvram.bin, and guests that boot by BIOS have no variables.
_NO_NVRAM = bytes(512)
_CONTAINER_PATH = "disk/disk.qcow2"
_CONTAINER_USER = 107  # qemu, in KubeVirt's own images

# Stage, bytes done, bytes to do (0, 0: unknown); called from several threads, one at a time.
Report = Callable[[str, int, int], None]


class PushTarget(Protocol):
    """What a push needs of `lumed.images.registry.Registry`."""

    def has_blob(self, repository: str, digest: str) -> bool: ...

    def upload_blob(
        self, repository: str, path: Path, digest: str, *, report: Callable[[int], None]
    ) -> None: ...

    def put_manifest(self, reference: ImageReference, media_type: str, raw: bytes) -> str: ...


def push_image(
    registry: PushTarget,
    references: Sequence[ImageReference],
    source: PushSource,
    *,
    format: PushFormat,
    work: Path,
    records: Path,
    stop: threading.Event,
    report: Report,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    single_layer: bool = False,
    uploaded_at: datetime | None = None,
) -> str:
    """Push a VM under all references (tags of one repository); returns the manifest's digest.

    Blocks until it is done; nobody may write to the disk meanwhile. work holds the scratch files
    (what killed pushes left there is removed), records what is known of earlier pushes.
    chunk_bytes is a multiple of 1 MiB; a container disk always is one layer.
    Raises RegistryFailed, ToolFailed for an unreadable disk, NoSpace before anything is sent,
    InvalidField (chunkSizeMb), Stopped soon after `stop` is set. The blobs that were sent stay
    in the registry, where the next push finds them.
    """
    repository = references[0].repository
    if any(reference.repository != repository for reference in references):
        raise ValueError("the references of one push are tags of one repository")
    if chunk_bytes <= 0 or chunk_bytes % BLOCK_BYTES:
        raise _refuse_chunk("the size of a chunk is a whole number of MB")
    sweep_staging(work)
    staging = Staging(work)
    try:
        with full_disk_is_no_space(work, "push the image"), contextlib.ExitStack() as opened:
            staging.open()
            report("reading the disk's map", 0, 0)
            disk = read_map(source.disk.absolute(), stop)
            cut = f"{format}:{0 if single_layer else chunk_bytes}"
            gzipper = opened.enter_context(Gzipper())
            reader = opened.enter_context(
                open_disk(source.disk.absolute(), staging.path, gzipper.workers)
            )
            push = _Push(
                registry,
                repository,
                staging.path,
                PushRecord(records, disk, cut),
                gzipper,
                stop,
                report,
            )
            if format is PushFormat.CONTAINER_DISK:
                manifest = _push_container_disk(push, source, disk, reader)
            else:
                chunk = None if single_layer else chunk_bytes
                now = uploaded_at or datetime.now(UTC)
                manifest = _push_lume_image(push, source, disk, reader, chunk, now)
            for reference in references:
                push.check()
                registry.put_manifest(reference, OCI_MANIFEST, manifest)
            return digest_of(manifest)
    finally:
        staging.close()


def _push_lume_image(
    push: _Push,
    source: PushSource,
    disk: DiskMap,
    reader: DiskReader,
    chunk_bytes: int | None,
    uploaded_at: datetime,
) -> bytes:
    step = chunk_bytes or disk.size_bytes
    slices = [
        _Slice(offset, length, data, partial(_disk_pieces, disk, reader, offset, length))
        for offset in range(0, disk.size_bytes, step)
        for length in [min(step, disk.size_bytes - offset)]
        for data in [disk.count_data(offset, length)]
    ]
    make = partial(
        manifests.lume_manifest, source, chunk_bytes=chunk_bytes, uploaded_at=uploaded_at
    )
    config = manifests.lume_config(source)
    config_blob = Descriptor(lume.CONFIG, digest_of(config), len(config))
    nvram = _read_nvram(source, push.scratch)
    # As long as with the real digests, and hardly shorter with their sizes.
    sketch = [PushedSlice(s.offset, s.length, _NO_DIGEST, s.length, _NO_DIGEST) for s in slices]
    size = len(make(config_blob, nvram.blob, sketch))
    if len(slices) >= MAX_LAYERS or size > MAX_MANIFEST_BYTES:
        raise _refuse_chunk(
            f"{len(slices)} chunks are more than a manifest can list; choose larger ones"
        )
    parts = push.send_slices(slices)
    push.send_content(config)
    push.send_content(nvram.content)
    return make(config_blob, nvram.blob, parts)


def _push_container_disk(
    push: _Push, source: PushSource, disk: DiskMap, reader: DiskReader
) -> bytes:
    file = FlatQcow2(disk, reader.read)
    head = _tar_head(file.size_bytes)
    end = bytes(2 * tarfile.BLOCKSIZE)  # the file itself is whole blocks

    def pieces() -> Iterator[Piece]:
        yield Piece(len(head), lambda: head)
        yield from file.pieces()
        yield Piece(len(end), None)

    length = len(head) + file.size_bytes + len(end)
    [part] = push.send_slices([_Slice(0, length, file.size_bytes, pieces)])
    config = manifests.container_config(source, part.content_digest)
    push.send_content(config)
    return manifests.container_manifest(
        source,
        Descriptor(OCI_CONFIG, digest_of(config), len(config)),
        Descriptor(manifests.OCI_LAYER_GZIP, part.digest, part.size_bytes),
    )


def _tar_head(file_bytes: int) -> bytes:
    folder = tarfile.TarInfo(str(Path(_CONTAINER_PATH).parent))
    folder.type, folder.mode = tarfile.DIRTYPE, 0o755
    file = tarfile.TarInfo(_CONTAINER_PATH)
    file.size, file.mode = file_bytes, 0o440
    head = b""
    for member in (folder, file):
        member.uid = member.gid = _CONTAINER_USER
        # GNU's form has room for more than 8 GiB in the one header block.
        head += member.tobuf(tarfile.GNU_FORMAT)
    return head


def _disk_pieces(disk: DiskMap, reader: DiskReader, offset: int, length: int) -> Iterator[Piece]:
    for at in range(offset, offset + length, BLOCK_BYTES):
        count = min(BLOCK_BYTES, offset + length - at)
        has_data = disk.blocks[at // BLOCK_BYTES]
        yield Piece(count, partial(reader.read, at, count) if has_data else None)


@dataclass(frozen=True, slots=True)
class _Nvram:
    content: bytes
    blob: Descriptor


def _read_nvram(source: PushSource, scratch: Path) -> _Nvram:
    """The UEFI variables as Lume keeps them, raw; the zeros behind them are cut off.

    QEMU's flash for arm64 is 64 MiB with less than 1 MiB of content, and the layer is sent as it
    is; an annotation tells the size that QEMU wants.
    """
    content, annotations = _NO_NVRAM, {}
    if source.uefi_vars is not None:
        raw = scratch / "nvram.bin"
        convert = ("qemu-img", "convert", "-f", "qcow2", "-O", "raw")
        run_tool_blocking([*convert, source.uefi_vars, raw], timeout_s=60)
        whole = raw.read_bytes()
        content = whole.rstrip(b"\0") or _NO_NVRAM
        if len(content) < len(whole):
            annotations = {manifests.NVRAM_FULL_SIZE: str(len(whole))}
    digest = digest_of(content)
    return _Nvram(content, Descriptor(lume.NVRAM, digest, len(content), annotations))


@dataclass(frozen=True, slots=True)
class _Slice:
    """A part of the disk (or all of it, wrapped) that becomes one blob.

    data_bytes of it are read; pieces gives it from its start.
    """

    offset: int
    length: int
    data_bytes: int
    pieces: Callable[[], Iterable[Piece]]

    @property
    def most_blob_bytes(self) -> int:
        """How large its gzip file can become; a MiB of zeros takes less than 2 KiB."""
        return self.data_bytes + self.data_bytes // 1024 + self.length // 512 + MIB


@dataclass(slots=True)
class _Push:
    """One push under way; its methods may run in several threads at once."""

    registry: PushTarget
    repository: str
    scratch: Path
    record: PushRecord
    gzipper: Gzipper
    stop: threading.Event
    report: Report
    _failed: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _sending: dict[str, threading.Lock] = field(default_factory=dict)
    _in_registry: set[str] = field(default_factory=set)
    _done_halves: int = 0
    _total: int = 0

    def check(self) -> None:
        """Raise Stopped if the push is to end."""
        if self.stop.is_set() or self._failed.is_set():
            raise Stopped

    def send_slices(self, slices: Sequence[_Slice]) -> list[PushedSlice]:
        """See to it that the registry has all slices; what they became, in their order."""
        largest = nlargest(_SLICES_AT_ONCE, (s.most_blob_bytes for s in slices))
        check_free_space(self.scratch, sum(largest), "compress the image")
        jobs: dict[int, Future[PushedSlice]] = {}
        empty: dict[int, Future[PushedSlice]] = {}
        self._total = sum(s.data_bytes for s in slices)
        with ThreadPoolExecutor(_SLICES_AT_ONCE, thread_name_prefix="push") as pool:
            for one in slices:
                # Empty slices of one length are one blob, compressed once.
                if one.data_bytes or one.length not in empty:
                    jobs[one.offset] = pool.submit(self._send_slice, one)
                    if not one.data_bytes:
                        empty[one.length] = jobs[one.offset]
                else:
                    jobs[one.offset] = empty[one.length]
            done, _ = wait(jobs.values(), return_when=FIRST_EXCEPTION)
            errors = [error for job in done if (error := job.exception())]
            if errors:
                self._failed.set()
                pool.shutdown(cancel_futures=True)
                # The others then end as Stopped, which says nothing.
                raise next((e for e in errors if not isinstance(e, Stopped)), errors[0])
        return [replace(jobs[one.offset].result(), offset=one.offset) for one in slices]

    def send_content(self, content: bytes) -> None:
        """See to it that the registry has a small blob."""
        digest = digest_of(content)
        path = self.scratch / digest.replace(":", "-")
        path.write_bytes(content)
        self._send_file(path, digest, lambda _: self.check())

    def _send_slice(self, one: _Slice) -> PushedSlice:
        self.check()
        known = self.record.find(one.offset)
        if known is not None and known.length == one.length and self._is_there(known.digest):
            self._advance(2 * one.data_bytes)
            return known
        path = self.scratch / f"slice-{one.offset}"
        with path.open("wb", buffering=MIB) as file:
            member = self.gzipper.write(one.pieces(), file, self._report_piece)
        part = PushedSlice(
            one.offset, one.length, member.digest, member.size_bytes, member.content_digest
        )
        self.record.add(part)
        reported = 0

        def report_sent(sent: int) -> None:
            nonlocal reported
            self.check()
            # It falls back after a break; the progress then stands still.
            now = max(reported, one.data_bytes * sent // part.size_bytes)
            self._advance(now - reported)
            reported = now

        self._send_file(path, part.digest, report_sent)
        report_sent(part.size_bytes)
        return part

    def _send_file(self, path: Path, digest: str, report: Callable[[int], None]) -> None:
        """Send a file unless the registry has its content, and remove it."""
        with self._lock:
            lock = self._sending.setdefault(digest, threading.Lock())
        with lock:
            if not self._is_there(digest):
                self.registry.upload_blob(self.repository, path, digest, report=report)
                self._in_registry.add(digest)
        path.unlink()

    def _is_there(self, digest: str) -> bool:
        if digest not in self._in_registry:
            if not self.registry.has_blob(self.repository, digest):
                return False
            self._in_registry.add(digest)
        return True

    def _report_piece(self, piece: Piece) -> None:
        self.check()
        if piece.read is not None:
            self._advance(piece.length)

    def _advance(self, halves: int) -> None:
        """Half of the progress is compressing, half is sending."""
        with self._lock:
            self._done_halves += halves
            self.report(_STAGE, min(self._done_halves // 2, self._total), self._total)


def _refuse_chunk(reason: str) -> InvalidField:
    return InvalidField(f"chunkSizeMb: {reason}", fields={"chunkSizeMb": reason})
