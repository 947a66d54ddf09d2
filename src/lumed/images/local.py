"""The images that VMs rest on: pulled, built, or private copies of local files; all read-only.

A published image directory is never changed. It is removed only when nothing rests on it: a VM
on the same file system holds a hard link to the disk, so that the kernel counts; of the others
the caller knows.

    <directory>/<id>/            disk.qcow2 or disk.raw (0444), perhaps kernel and initramfs,
                                 image.json; appears by one rename, complete and synced
    <directory>/.names/          which name is which image (names.py)
    <directory>/.staging/<n>/    an image being made, with the lock of its maker; after a kill
                                 the lock is free and sweep() removes the directory

The id is made of what identifies the source, so the same source is found at once; `-2` and so
on are appended where a damaged directory holds the name.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import threading
import uuid
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from lumed.errors import LumedError, NotFound, WrongState
from lumed.files import full_disk_is_no_space, sync_dir, sync_file, write_atomic
from lumed.images.architecture import find_architecture_of
from lumed.images.blobs import drop_idle_blobs
from lumed.images.copy import copy_image
from lumed.images.inspect import find_format, inspect_disk_blocking, open_image, refuse
from lumed.images.names import ImageNames
from lumed.images.qcow2 import UnfitImage
from lumed.images.record import RECORD, CachedImage, encode_record, read_image
from lumed.images.staging import LOCK, Staging, sweep_staging
from lumed.model.image import ImageAbout
from lumed.model.vm import Architecture, Firmware
from lumed.threads import in_loop, run_to_end

_STAGING = ".staging"
_NAMES = ".names"
# Copies, pulls and pushes: threads of their own, since they last longer than a request.
_LONG_WORK_AT_ONCE = 4
_KEEP_DOWNLOADS_S = 14 * 86_400.0

# Stage, bytes done, bytes to do (0, 0: unknown); called in the event loop.
Report = Callable[[str, int, int], None]
# Called with what an image says of itself, before its first byte is fetched; may refuse it.
Accept = Callable[[ImageAbout], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class BuiltImage:
    """What a builder left in the directory it was given; the files lie directly in it."""

    disk: Path
    kernel: Path | None = None
    initramfs: Path | None = None
    about: ImageAbout = field(default_factory=ImageAbout)


@dataclass(frozen=True, slots=True)
class Builtin:
    """A built-in image. A new version is built anew and lies beside the old one.

    build fills an empty directory and says in words what it does.
    """

    version: str
    build: Callable[[Path, Callable[[str], None]], Awaitable[BuiltImage]]


T = TypeVar("T")


class ImageCache:
    """The images under one directory, which several servers may share."""

    def __init__(self, directory: Path, builtins: Mapping[str, Builtin]) -> None:
        self._directory = directory.absolute()
        self._builtins = dict(builtins)
        self._making: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._long_work = ThreadPoolExecutor(_LONG_WORK_AT_ONCE, thread_name_prefix="image")

    @property
    def names(self) -> ImageNames:
        """Which name is which image."""
        return ImageNames(self._directory / _NAMES)

    @property
    def blobs(self) -> Path:
        """Where unfinished downloads lie."""
        return self._directory.parent / "blobs"

    @property
    def scratch(self) -> Path:
        """Where parts of a disk lie while they are pushed."""
        return self._directory.parent / "pushes" / "scratch"

    @property
    def push_records(self) -> Path:
        """What is known of earlier pushes, so that an interrupted one goes on."""
        return self._directory.parent / "pushes"

    @property
    def builtin_names(self) -> frozenset[str]:
        """The names that get_builtin knows."""
        return frozenset(self._builtins)

    def use_directory(self, directory: Path) -> None:
        """Keep images there from now on; VMs go on resting on those at the old place."""
        self._directory = directory.absolute()

    async def import_file(self, path: Path, report: Report) -> CachedImage:
        """The image made from a local qcow2 or raw file; copied at first use, then found.

        The same file is one that has the same real path, inode, size and time of change. Raises
        InvalidField (`fields["image"]`) if it is not fit, NoSpace, WrongState if a machine writes
        to it. A failed or cancelled import leaves nothing behind.
        """
        source, image_id = await asyncio.to_thread(_identify_file, path)
        async with self._single(image_id):
            found = await asyncio.to_thread(self._find_first, image_id)
            if found is not None:
                return found
            stop = threading.Event()
            tell = in_loop(partial(report, "copying"))
            make = partial(self._import, path, source, image_id, stop, tell)
            return await self.run_long(make, stop)

    async def run_long(self, work: Callable[[], T], stop: threading.Event) -> T:
        """Run work of minutes in a thread; a cancellation sets stop and waits for its end."""
        return await run_to_end(work, on_cancel=stop.set, executor=self._long_work)

    async def get_builtin(self, name: str, report: Report) -> CachedImage:
        """The built-in image `name`, built at first use. Raises NotFound if there is none."""
        builtin = self._builtins.get(name)
        if builtin is None:
            known = ", ".join(sorted(self._builtins)) or "none"
            raise NotFound(f"Image not found: {name}", hint=f"built-in images: {known}")
        image_id = f"{name}-{builtin.version}"
        return await self.get_or_make(
            image_id, name, lambda path: builtin.build(path, lambda stage: report(stage, 0, 0))
        )

    async def get_or_make(
        self, image_id: str, name: str, fill: Callable[[Path], Awaitable[BuiltImage]]
    ) -> CachedImage:
        """The image of that id; if there is none, fill makes it in the directory it gets.

        Raises what fill does, InvalidField if it is no fit disk, NoSpace. A failed or cancelled
        making leaves nothing behind.
        """
        async with self._single(image_id):
            found = await asyncio.to_thread(self._find_first, image_id)
            if found is not None:
                return found
            staging = Staging(self._directory / _STAGING)
            try:
                with full_disk_is_no_space(self._directory, f"make {name}"):
                    await run_to_end(staging.open)
                    built = await fill(staging.path)
                    return await run_to_end(partial(self._publish, staging, image_id, name, built))
            finally:
                await run_to_end(staging.close)

    def find(self, image_id: str) -> CachedImage | None:
        """The image of that id, or None if it is missing or damaged. Blocks for some 0.1 ms."""
        if not image_id or "/" in image_id or image_id.startswith("."):
            return None
        return read_image(self._directory / image_id)

    def find_named(self, name: str) -> CachedImage | None:
        """The image of that name. Blocks for some 0.1 ms."""
        image_id = self.names.find(name)
        return None if image_id is None else self.find(image_id)

    def list_images(self) -> list[CachedImage]:
        """Every whole image. Blocks for some 0.1 ms an image."""
        try:
            entries = sorted(self._directory.iterdir())
        except FileNotFoundError:
            return []
        return list(filter(None, (read_image(e) for e in entries if not e.name.startswith("."))))

    def remove(self, image: CachedImage) -> None:
        """Remove an image and its names. Blocks.

        Raises WrongState if a VM is being made from it, or holds a hard link to its disk.
        """
        record = image.directory / RECORD
        try:
            fd = os.open(record, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise WrongState(f"A VM is just being made from the image {image.name}") from None
            if is_linked(image):
                raise WrongState(f"VMs rest on the image {image.name}")
            doomed = self._directory / _STAGING / uuid.uuid4().hex
            doomed.parent.mkdir(exist_ok=True, mode=0o700)
            # One step, so that nobody finds half an image; a kill leaves the rest to the sweep.
            image.directory.rename(doomed)
        finally:
            os.close(fd)
        for name, image_id in self.names.read_all().items():
            if image_id == image.id:
                self.names.remove(name)
        shutil.rmtree(doomed, ignore_errors=True)

    async def sweep(self) -> int:
        """Remove what killed servers left half made, and downloads that were given up long ago.

        Returns how many images were half made.
        """
        drop = partial(drop_idle_blobs, self.blobs, untouched_s=_KEEP_DOWNLOADS_S)
        await run_to_end(drop)
        return await run_to_end(partial(sweep_staging, self._directory / _STAGING))

    @contextlib.asynccontextmanager
    async def _single(self, image_id: str) -> AsyncIterator[None]:
        """One maker for each image: the others wait, and then find it (or fail by themselves)."""
        lock = self._making.setdefault(image_id, asyncio.Lock())
        async with lock:
            yield

    def _candidates(self, image_id: str) -> Iterator[Path]:
        """The directories an image may have, up to and with the first that does not exist."""
        number = 1
        while True:
            path = self._directory / (image_id if number == 1 else f"{image_id}-{number}")
            yield path
            if not path.exists():
                return
            number += 1

    def _find_first(self, image_id: str) -> CachedImage | None:
        return next(filter(None, map(read_image, self._candidates(image_id))), None)

    def _import(
        self,
        path: Path,
        source: Path,
        image_id: str,
        stop: threading.Event,
        report: Callable[[int, int], None],
    ) -> CachedImage:
        staging = Staging(self._directory / _STAGING)
        try:
            with (
                full_disk_is_no_space(self._directory, f"import {path.name}"),
                open_image(source, shown_as=path) as fd,
            ):
                if _identify(source, os.fstat(fd)) != image_id:
                    raise UnfitImage("it changed just now", "try again")
                find_format(fd, path)  # before a large copy that would be refused after it
                staging.open()
                disk = staging.path / "disk"
                copy_image(fd, disk, stop=stop, report=report)
                built = BuiltImage(disk)
                return self._publish(staging, image_id, str(source), built, shown_as=path)
        except UnfitImage as error:
            raise refuse(path, str(error), error.hint) from error
        finally:
            staging.close()

    def _publish(
        self,
        staging: Staging,
        image_id: str,
        name: str,
        built: BuiltImage,
        *,
        shown_as: Path | None = None,
    ) -> CachedImage:
        """Inspect, make read-only and durable, and let the image appear by one rename."""
        # The copy is inspected, not the source, which can change at any time.
        facts = inspect_disk_blocking(built.disk, shown_as=shown_as or Path(name))
        disk = built.disk.rename(staging.path / f"disk.{facts.format}")
        for file in filter(None, (disk, built.kernel, built.initramfs)):
            file.chmod(0o444)
            sync_file(file)
        # The disk knows better than whoever described it, and few formats say it at all.
        architecture = find_architecture_of(disk, facts.format) or built.about.architecture
        about = replace(built.about, architecture=architecture)
        if architecture is Architecture.ARM64:
            # Boot code in the first sector is for another processor, or none.
            facts = replace(facts, firmware=Firmware.UEFI)
        extra = (built.kernel, built.initramfs, about)
        image = CachedImage(image_id, name, disk, facts, *extra)
        write_atomic(staging.path / RECORD, encode_record(image))
        for final in self._candidates(image_id):
            try:
                staging.path.rename(final)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                # Another server was quicker, or a damaged image holds the name.
                if (theirs := read_image(final)) is not None:
                    return theirs
                continue
            sync_dir(self._directory)
            (final / LOCK).unlink(missing_ok=True)
            break
        published = read_image(final)
        if published is None:
            raise LumedError(f"The image {name} was damaged while it was published: {final}")
        return published


@contextlib.contextmanager
def hold_image(image: CachedImage) -> Iterator[None]:
    """Keep an image from being removed while a VM is made from it, and note its use. Blocks.

    Raises NotFound if it was removed just now.
    """
    record = image.directory / RECORD
    try:
        fd = os.open(record, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(f"The image {image.name} was removed just now", hint="try again") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        if not record.exists():
            raise NotFound(f"The image {image.name} was removed just now", hint="try again")
        os.utime(record)
        yield
    finally:
        os.close(fd)


def is_linked(image: CachedImage) -> bool:
    """Whether a VM holds a hard link to the disk: of this home or of another."""
    return image.disk.stat().st_nlink > 1


def _identify_file(path: Path) -> tuple[Path, str]:
    """The real path of a user's file, and the id of the image made from it as it is now."""
    with open_image(path, shown_as=path) as fd:
        found = os.fstat(fd)
    source = path.resolve()
    return source, _identify(source, found)


def _identify(source: Path, found: os.stat_result) -> str:
    identity = f"{source}\0{found.st_ino}\0{found.st_size}\0{found.st_mtime_ns}"
    return f"file-{hashlib.sha256(os.fsencode(identity)).hexdigest()[:24]}"
