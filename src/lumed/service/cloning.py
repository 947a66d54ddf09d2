"""Making a VM from another: nothing is copied that the two can share.

Which way a disk goes, the first that is possible:

1. The file system lets two files share their blocks (reflink), or the disk holds next to
   nothing since the last clone: the file is copied, what is below it is shared.
2. What the disk holds becomes a layer under both (store/layers.py). A chain that has grown too
   long becomes one layer first, which takes as long as copying what it holds.
3. The clone shall be on another file system: everything but the image is copied.
"""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from lumed.errors import WrongState
from lumed.files import check_free_space, full_disk_is_no_space
from lumed.images.copy import copy_image, reflink
from lumed.images.qcow2 import UnfitImage
from lumed.model.request import CreateRequest
from lumed.model.vm import VmConfig
from lumed.naming import new_mac_address
from lumed.service.operations import RunningOperation, utc_now
from lumed.service.provisioning import check_location
from lumed.store.layers import (
    MOST_LAYERS,
    flatten,
    freeze,
    hold_still,
    link_file,
    new_layer,
    read_layers,
    remove_strays,
    rest_on,
)
from lumed.store.staging import start_staging
from lumed.store.vmdir import VmDir, write_config
from lumed.threads import in_loop, run_to_end
from lumed.units import MIB

# Copied in 5 ms; a layer would cost every later read of both VMs a little.
_COPIED_BYTES = 4 * MIB
_FLATTEN_S = 6 * 3600.0
# Of their own: some take minutes, and no request should wait for a thread until they are over.
_threads = ThreadPoolExecutor(4, thread_name_prefix="clone")


def request_of_clone(name: str, source: VmConfig) -> CreateRequest:
    """What a VM like `source` would be asked for as: how the clone shows until it is there."""
    return CreateRequest(
        name=name,
        os=source.os,
        cpu_count=source.cpu_count,
        memory_bytes=source.memory_bytes,
        disk_size_bytes=source.disk_size_bytes,
        display=source.display,
        image=source.image,
        network=source.network,
    )


async def make_clone(
    source: VmDir, config: VmConfig, name: str, location: Path, operation: RunningOperation
) -> None:
    """Make the VM `name` from a stopped one; whatever fails on the way leaves both as they were.

    Raises WrongState if a process writes to the source's disk, NoSpace, AlreadyExists.
    """
    await asyncio.to_thread(check_location, location, f"clone {source.name}")
    operation.stage("making the disk")
    changed = replace(
        config,
        uuid=str(uuid.uuid4()),
        mac_address=new_mac_address(),
        created_at=utc_now(),
        is_clone=True,
    )
    stop = threading.Event()
    async with start_staging(location, operation.id) as staged:
        report = in_loop(partial(operation.report, "copying"))
        work = _Copying(source, staged.vm_dir, stop, report)
        await run_to_end(work.make_disk, on_cancel=stop.set, executor=_threads)
        await run_to_end(partial(write_config, staged.vm_dir, changed))
        await run_to_end(partial(staged.publish, name))


class _Copying:
    """The files of one clone in the making; its methods block."""

    def __init__(
        self,
        source: VmDir,
        target: VmDir,
        stop: threading.Event,
        report: Callable[[int, int], None],
    ) -> None:
        self._source = source
        self._target = target
        self._stop = stop
        self._report = report

    def make_disk(self) -> None:
        """The disk with all that it rests on, and the UEFI variables."""
        with full_disk_is_no_space(self._target.path, f"clone {self._source.name}"):
            self._make_disk()
            if self._source.image_link.exists():
                link_file(self._source.image_link, self._target.image_link)
            if self._source.uefi_vars.exists():
                self._copy(self._source.uefi_vars, self._target.uefi_vars)

    def _make_disk(self) -> None:
        source, target = self._source.disk, self._target.disk
        with hold_still(source) as fd:
            if not self._is_small(fd) and not self._try_reflink(fd) and self._can_link():
                layers = read_layers(source)
                if len(layers) < MOST_LAYERS:
                    freeze(source)
                else:
                    self._flatten(fd, layers)
            for layer in read_layers(source):
                self._share(layer)
            if not target.exists():
                self._copy(source, target)
            remove_strays(target)

    def _is_small(self, fd: int) -> bool:
        return os.fstat(fd).st_blocks * 512 <= _COPIED_BYTES

    def _try_reflink(self, fd: int) -> bool:
        disk = self._target.disk
        target = os.open(disk, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if reflink(fd, target):
                os.fsync(target)
                return True
        finally:
            os.close(target)
        disk.unlink()
        return False

    def _can_link(self) -> bool:
        probe = self._target.path / "probe"
        if not link_file(self._source.disk, probe):
            return False
        probe.unlink()
        return True

    def _flatten(self, fd: int, layers: tuple[Path, ...]) -> None:
        """Let the source rest on one layer. Made in the clone's folder, where a sweep finds it."""
        folder = self._target.path
        needed = sum(file.stat().st_blocks * 512 for file in (self._source.disk, *layers))
        check_free_space(folder, needed, "join the layers of the disk")
        for layer in layers:
            self._share(layer)
        flat = new_layer(folder)
        self._copy_open(fd, flat)
        flatten(flat, stop=self._stop, timeout_s=_FLATTEN_S)
        layer = self._source.path / flat.name
        if link_file(flat, layer):
            rest_on(self._source.disk, layer)

    def _share(self, layer: Path) -> None:
        # Nobody has a reason to write to it, from now on for ever; not even by mistake.
        layer.chmod(0o444)
        shared = self._target.path / layer.name
        if not shared.exists() and not link_file(layer, shared):
            self._copy(layer, shared)
            shared.chmod(0o444)

    def _copy(self, source: Path, target: Path) -> None:
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            self._copy_open(fd, target)
        finally:
            os.close(fd)

    def _copy_open(self, fd: int, target: Path) -> None:
        try:
            copy_image(fd, target, stop=self._stop, report=self._report)
        except UnfitImage as error:
            raise WrongState(f"{self._source.name} cannot be cloned: {error}") from error
