"""The images that VMs rest on: private, read-only copies of local files, and built-in ones.

A VM's disk is an overlay that names the image's path, so a published image directory is never
changed and never deleted here, not even a damaged one.

    <directory>/<id>/            disk.qcow2 or disk.raw (0444), perhaps kernel and initramfs,
                                 image.json; appears by one rename, complete and synced
    <directory>/.staging/<n>/    an image being made, with the lock of its maker; after a kill
                                 the lock is free and sweep() removes the directory

The id is made of what identifies the source, so the same source is found at once; `-2` and so
on are appended where a damaged directory holds the name.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
import uuid
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lumed.claim import RunLock, take_lock
from lumed.errors import LumedError, NotFound
from lumed.files import full_disk_is_no_space, sync_dir, sync_file, write_atomic
from lumed.images.copy import copy_image
from lumed.images.inspect import (
    DiskFacts,
    find_format,
    inspect_disk_blocking,
    open_image,
    refuse,
)
from lumed.images.qcow2 import UnfitImage
from lumed.model.vm import DiskFormat, Firmware
from lumed.threads import run_to_end

_META = "image.json"
_LOCK = "owner.lock"
_STAGING = ".staging"
_COPIES_AT_ONCE = 2  # each holds one of the few threads that the whole server shares

# Stage, bytes done, bytes to do (0, 0: unknown); called in the event loop.
Report = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class BuiltImage:
    """What a builder left in the directory it was given; the files lie directly in it."""

    disk: Path
    kernel: Path | None = None
    initramfs: Path | None = None


@dataclass(frozen=True, slots=True)
class Builtin:
    """A built-in image. A new version is built anew and lies beside the old one.

    build fills an empty directory and says in words what it does.
    """

    version: str
    build: Callable[[Path, Callable[[str], None]], Awaitable[BuiltImage]]


@dataclass(frozen=True, slots=True)
class CachedImage:
    """An image that VMs can rest on. name is the built-in's name or the source's path."""

    id: str
    name: str
    disk: Path
    facts: DiskFacts
    kernel: Path | None = None
    initramfs: Path | None = None


class ImageCache:
    """The images under one directory, which several servers may share."""

    def __init__(self, directory: Path, builtins: Mapping[str, Builtin]) -> None:
        self._directory = directory.absolute()
        self._builtins = dict(builtins)
        self._making: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._copies = asyncio.Semaphore(_COPIES_AT_ONCE)

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
            async with self._copies:
                stop = threading.Event()
                loop = asyncio.get_running_loop()

                def report_copy(done: int, total: int) -> None:
                    loop.call_soon_threadsafe(report, "copying", done, total)

                make = partial(self._import, path, source, image_id, stop, report_copy)
                return await run_to_end(make, on_cancel=stop.set)

    async def get_builtin(self, name: str, report: Report) -> CachedImage:
        """The built-in image `name`, built at first use. Raises NotFound if there is none."""
        builtin = self._builtins.get(name)
        if builtin is None:
            known = ", ".join(sorted(self._builtins)) or "none"
            raise NotFound(f"Image not found: {name}", hint=f"built-in images: {known}")
        image_id = f"{name}-{builtin.version}"
        async with self._single(image_id):
            found = await asyncio.to_thread(self._find_first, image_id)
            if found is not None:
                return found
            staging = _Staging(self._directory / _STAGING)
            try:
                with full_disk_is_no_space(self._directory, f"build {name}"):
                    await run_to_end(staging.open)
                    built = await builtin.build(staging.path, lambda stage: report(stage, 0, 0))
                    return await run_to_end(partial(self._publish, staging, image_id, name, built))
            finally:
                await run_to_end(staging.close)

    def find(self, image_id: str) -> CachedImage | None:
        """The image of that id, or None if it is missing or damaged. Blocks for some 0.1 ms."""
        if not image_id or "/" in image_id or image_id.startswith("."):
            return None
        return _read_image(self._directory / image_id)

    async def sweep(self) -> int:
        """Remove what killed servers left half made; returns how many there were."""
        return await run_to_end(self._sweep)

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
        return next(filter(None, map(_read_image, self._candidates(image_id))), None)

    def _import(
        self,
        path: Path,
        source: Path,
        image_id: str,
        stop: threading.Event,
        report: Callable[[int, int], None],
    ) -> CachedImage:
        staging = _Staging(self._directory / _STAGING)
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
        staging: _Staging,
        image_id: str,
        name: str,
        built: BuiltImage,
        *,
        shown_as: Path | None = None,
    ) -> CachedImage:
        """Inspect, make read-only and durable, and let the image appear by one rename."""
        # The copy is inspected, not the source, which can change at any time.
        facts = inspect_disk_blocking(built.disk, shown_as=shown_as)
        disk = built.disk.rename(staging.path / f"disk.{facts.format}")
        for file in filter(None, (disk, built.kernel, built.initramfs)):
            file.chmod(0o444)
            sync_file(file)
        meta = _Meta(name, disk, facts, built.kernel, built.initramfs)
        write_atomic(staging.path / _META, meta.encode())
        for final in self._candidates(image_id):
            try:
                staging.path.rename(final)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                # Another server was quicker, or a damaged image holds the name.
                if (theirs := _read_image(final)) is not None:
                    return theirs
                continue
            sync_dir(self._directory)
            (final / _LOCK).unlink(missing_ok=True)
            break
        image = _read_image(final)
        if image is None:
            raise LumedError(f"The image {name} was damaged while it was published: {final}")
        return image

    def _sweep(self) -> int:
        swept = 0
        try:
            leftovers = list((self._directory / _STAGING).iterdir())
        except FileNotFoundError:
            return 0
        for path in leftovers:
            # Finished or swept meanwhile; or a stray file, which is not ours.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                lock = take_lock(path / _LOCK)
                if lock is not None:
                    shutil.rmtree(path, ignore_errors=True)
                    lock.close()
                    swept += 1
        return swept


class _Staging:
    """A directory for an image being made, with the lock that tells a sweep to leave it alone."""

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self._lock: RunLock | None = None
        self.path = parent / uuid.uuid4().hex

    def open(self) -> None:
        """Make the directory."""
        while self._lock is None:
            self.path.mkdir(parents=True, mode=0o700)
            # Another server's sweep may take the directory before we have locked it.
            with contextlib.suppress(FileNotFoundError):
                self._lock = take_lock(self.path / _LOCK)
            if self._lock is None or not (self.path / _LOCK).exists():
                self.close()
                self.path = self._parent / uuid.uuid4().hex

    def close(self) -> None:
        """Remove the directory, unless it was published or never made, and drop the lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()
            self._lock = None


@dataclass(frozen=True, slots=True)
class _Meta:
    """The content of image.json."""

    name: str
    disk: Path
    facts: DiskFacts
    kernel: Path | None
    initramfs: Path | None

    def encode(self) -> bytes:
        content = {
            "version": 1,
            "name": self.name,
            "disk": self.disk.name,
            "diskBytes": self.disk.stat().st_size,
            "format": self.facts.format,
            "virtualSizeBytes": self.facts.virtual_size_bytes,
            "firmware": self.facts.firmware,
            "kernel": self.kernel and self.kernel.name,
            "initramfs": self.initramfs and self.initramfs.name,
        }
        return json.dumps(content, indent=2).encode()


def _read_image(directory: Path) -> CachedImage | None:
    """The image in a directory; None if it is not complete and as it was published."""
    try:
        content = json.loads((directory / _META).read_bytes())
        disk = directory / Path(content["disk"]).name
        found = disk.stat()
        files = [content[key] and directory / Path(content[key]).name for key in _EXTRA_FILES]
        if found.st_size != content["diskBytes"] or not all(f is None or f.exists() for f in files):
            return None
        return CachedImage(
            id=directory.name,
            name=str(content["name"]),
            disk=disk,
            facts=DiskFacts(
                DiskFormat(content["format"]),
                int(content["virtualSizeBytes"]),
                found.st_blocks * 512,
                Firmware(content["firmware"]),
            ),
            kernel=files[0],
            initramfs=files[1],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


_EXTRA_FILES = ("kernel", "initramfs")


def _identify_file(path: Path) -> tuple[Path, str]:
    """The real path of a user's file, and the id of the image made from it as it is now."""
    with open_image(path, shown_as=path) as fd:
        found = os.fstat(fd)
    source = path.resolve()
    return source, _identify(source, found)


def _identify(source: Path, found: os.stat_result) -> str:
    identity = f"{source}\0{found.st_ino}\0{found.st_size}\0{found.st_mtime_ns}"
    return f"file-{hashlib.sha256(os.fsencode(identity)).hexdigest()[:24]}"
