"""The VMs on disk, read again only where something changed.

A cache, never the truth: each look compares the size, inode and time of a VM's files with what
was read, so that a VM that a person edits, restores or removes by hand is seen as it is. A list
leaves out the look into folders that the kernel says nobody has touched (watch.py).
"""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass, replace
from pathlib import Path

from lumed.errors import Damaged, NotFound, ToolFailed
from lumed.log import EventLog
from lumed.model.end import MachineEnd
from lumed.model.vm import VmConfig
from lumed.store.disk import read_usage
from lumed.store.layers import read_layers
from lumed.store.locations import Locations
from lumed.store.runrecord import read_end_record
from lumed.store.vmdir import VmDir, read_config
from lumed.store.watch import FolderWatch

_log = EventLog("store")

# Inode and allocated bytes of the disk, then inode, time and size of each other file; an empty
# tuple for a file that is not there.
Signature = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class StoredVm:
    """One VM on disk. config is None, and damage says why, if it cannot be read.

    The same object comes back from every look while nothing changed. allocated_bytes is what
    the disk takes on the host with all its layers, also those that it shares with other VMs.
    """

    vm_dir: VmDir
    location_name: str
    config: VmConfig | None
    damage: Damaged | None
    allocated_bytes: int
    end: MachineEnd | None
    signature: Signature

    @property
    def name(self) -> str:
        """The VM's name."""
        return self.vm_dir.name


class VmIndex:
    """All VMs of a home. Every method blocks for a few milliseconds; safe from threads."""

    def __init__(self, locations: Locations) -> None:
        self.locations = locations
        self._lock = threading.Lock()
        # By the folder's path as text: a Path costs more than all the stat calls of a look.
        self._known: dict[str, StoredVm] = {}
        self._watch = FolderWatch()

    def list_vms(self, location: str | None = None) -> list[StoredVm]:
        """The VMs of one location, or of all; sorted by name."""
        places = self.locations.every()
        if location is not None:
            places = [place for place in places if place[0] == location]
        found: list[StoredVm] = []
        with self._lock:
            self._watch.update()
            for name, directory in places:
                found += self._scan(name, directory)
        return sorted(found, key=lambda vm: vm.name)

    def find(self, name: str, location: str | None = None) -> StoredVm | None:
        """The VM of that name, in one location or in the first that has it."""
        if name.startswith("."):
            return None
        for place, directory in self.locations.every():
            if location is not None and place != location:
                continue
            with self._lock:
                stored = self._look(os.path.join(directory, name), place)  # noqa: PTH118
            if stored is not None:
                return stored
        return None

    def find_all(self, name: str) -> list[StoredVm]:
        """The VMs of that name, in whatever locations."""
        found = (self.find(name, place) for place, _ in self.locations.every())
        return [vm for vm in found if vm is not None]

    def get(self, name: str, location: str | None = None) -> StoredVm:
        """`find`, raising NotFound that says where else the name exists."""
        stored = self.find(name, location)
        if stored is not None:
            return stored
        elsewhere = self.find(name) if location is not None else None
        raise NotFound(
            f"Virtual machine not found: {name}",
            hint=None if elsewhere is None else f"it is in storage {elsewhere.location_name}",
        )

    def _scan(self, location_name: str, directory: Path) -> list[StoredVm]:
        try:
            with os.scandir(directory) as entries:
                folders = [
                    entry.path
                    for entry in entries
                    if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
                ]
        except FileNotFoundError:
            return []
        except OSError as error:
            _log.warning("location unreadable", path=directory, error=error)
            return []
        vms = (self._glance(folder, location_name) for folder in folders)
        return [vm for vm in vms if vm is not None]

    def _glance(self, folder: str, location_name: str) -> StoredVm | None:
        """`_look`, unless the folder was left alone; a guest that writes touches only its disk."""
        known = self._known.get(folder)
        if (
            known is not None
            and known.location_name == location_name
            and self._watch.is_untouched(folder)
            and _disk_signature(folder) == known.signature[0]
        ):
            return known
        # Watched before it is read: what changes in between is told of.
        self._watch.add(folder)
        return self._look(folder, location_name)

    def _look(self, folder: str, location_name: str, attempts: int = 3) -> StoredVm | None:
        signature = _signature(folder)
        known = self._known.get(folder)
        if known and known.signature == signature and known.location_name == location_name:
            return known
        if not any(signature[:3]):
            # Neither a configuration nor a disk: some other folder, or a VM just deleted.
            self._known.pop(folder, None)
            return None
        stored = _read(VmDir(Path(folder)), location_name, signature)
        if stored.damage is not None:
            if attempts > 1 and _signature(folder) != signature:
                # Deleted, or made anew, while it was read.
                return self._look(folder, location_name, attempts - 1)
            _log.warning("vm damaged", vm=stored.name, error=stored.damage)
        self._known[folder] = stored
        return stored


def _read(vm_dir: VmDir, location_name: str, signature: Signature) -> StoredVm:
    config, damage = None, None
    try:
        config = read_config(vm_dir)
    except Damaged as error:
        damage = error
    if config is not None:
        # The disk itself knows its size better than the file that describes it.
        with contextlib.suppress(OSError, ToolFailed):
            config = _resized(config, read_usage(vm_dir.disk).virtual_bytes)
    allocated_bytes = signature[0][1] if signature[0] else 0
    with contextlib.suppress(OSError, Damaged):
        allocated_bytes += sum(layer.stat().st_blocks * 512 for layer in read_layers(vm_dir.disk))
    return StoredVm(
        vm_dir=vm_dir,
        location_name=location_name,
        config=config,
        damage=damage,
        allocated_bytes=allocated_bytes,
        end=read_end_record(vm_dir.end_record),
        signature=signature,
    )


def _resized(config: VmConfig, size_bytes: int) -> VmConfig:
    if config.disk_size_bytes == size_bytes:
        return config
    return replace(config, disk_size_bytes=size_bytes)


_ANY = VmDir(Path("any"))
_DESCRIPTIONS = tuple(f"/{path.name}" for path in (_ANY.config, _ANY.extra, _ANY.end_record))
_DISK = f"/{_ANY.disk.name}"


def _signature(folder: str) -> Signature:
    """What a look compares, the disk first. Four stat calls."""
    return (_disk_signature(folder), *(_file_signature(folder + name) for name in _DESCRIPTIONS))


def _disk_signature(folder: str) -> tuple[int, ...]:
    # Its time changes with each write of the guest: only the bytes that it takes count here.
    try:
        status = os.stat(folder + _DISK)  # noqa: PTH116 - half the cost of Path.stat
    except OSError:
        return ()
    return (status.st_ino, status.st_blocks * 512)


def _file_signature(path: str) -> tuple[int, ...]:
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return ()
    return (status.st_ino, status.st_mtime_ns, status.st_size)
