"""VMs in the making and VMs on their way out: neither can be mistaken for a VM.

A VM is made in `<location>/.staging/<operation>/` and published by one rename; it is deleted by
one rename into `<location>/.trash/`. Whatever a killed server leaves in those two folders is
swept by the next one: a staged VM's owner lock is then free.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lumed.claim import RunLock, is_locked, take_lock
from lumed.errors import AlreadyExists, Busy, NotFound
from lumed.files import full_disk_is_no_space, sync_dir
from lumed.store.vmdir import STAGING, TRASH, VmDir
from lumed.threads import run_to_end


@dataclass(frozen=True, slots=True)
class Staged:
    """A folder in which a VM is being made."""

    vm_dir: VmDir
    location: Path
    lock: RunLock

    def publish(self, name: str) -> VmDir:
        """Make it the VM `name`, in one step. Raises AlreadyExists."""
        target = self.location / name
        if os.path.lexists(target):
            raise AlreadyExists(f"Virtual machine already exists with name: {name}")
        sync_dir(self.vm_dir.path)
        # rename(2) replaces an empty folder, but only an empty one: a VM is never overwritten.
        self.vm_dir.path.rename(target)
        sync_dir(self.location)
        return VmDir(target)


@contextlib.asynccontextmanager
async def start_staging(location: Path, operation_id: str) -> AsyncIterator[Staged]:
    """A new staging folder; removed at the end unless it was published.

    Raises NoSpace or OSError if it cannot be made.
    """
    stack = contextlib.ExitStack()
    try:
        yield await run_to_end(partial(stack.enter_context, _staging(location, operation_id)))
    finally:
        await run_to_end(stack.close)


@contextlib.contextmanager
def _staging(location: Path, operation_id: str) -> Iterator[Staged]:
    directory = location / STAGING / operation_id
    lock_path = location / STAGING / f"{operation_id}.lock"
    with full_disk_is_no_space(location, "make a VM"):
        lock_path.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
        # The lock first: the sweep of another home's server, which may know this location too,
        # takes a folder without one for rubbish.
        lock = take_lock(lock_path)
    if lock is None:
        raise Busy(f"{lock_path} is held by another server")
    try:
        with full_disk_is_no_space(location, "make a VM"):
            directory.mkdir(mode=0o700)
        yield Staged(VmDir(directory), location, lock)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        lock_path.unlink(missing_ok=True)
        lock.close()


def remove_vm(vm_dir: VmDir, token: str) -> None:
    """Delete a VM: one rename, after which it is gone for everybody, then the files.

    Raises NotFound if it is gone already.
    """
    trash = vm_dir.path.parent / TRASH
    trash.mkdir(mode=0o700, exist_ok=True)
    doomed = trash / token
    try:
        vm_dir.path.rename(doomed)
    except FileNotFoundError as error:
        raise NotFound(f"Virtual machine not found: {vm_dir.name}") from error
    sync_dir(vm_dir.path.parent)
    shutil.rmtree(doomed)


def sweep(locations: Iterable[Path]) -> list[str]:
    """Remove what killed servers left; the ids of the operations whose staging was swept."""
    swept: list[str] = []
    for location in locations:
        shutil.rmtree(location / TRASH, ignore_errors=True)
        staging = location / STAGING
        if not staging.is_dir():
            continue
        for entry in sorted(staging.iterdir()):
            if entry.suffix == ".lock":
                continue
            lock = staging / f"{entry.name}.lock"
            if not is_locked(lock):
                shutil.rmtree(entry, ignore_errors=True)
                swept.append(entry.name)
        for lock in staging.glob("*.lock"):
            # Also those of VMs that were published in the instant before a kill.
            if not is_locked(lock):
                lock.unlink(missing_ok=True)
    return swept
