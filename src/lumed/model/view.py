"""A VM as it is seen: its configuration, its state and, while it runs, its machine."""

from __future__ import annotations

from dataclasses import dataclass

from lumed.model.end import MachineEnd
from lumed.model.run import AttachedDisk, Forward, SharedDirectory
from lumed.model.vm import Display, GuestOs, VmState


@dataclass(frozen=True, slots=True)
class VmView:
    """One VM for a reader of the API; None means unknown and is left out there.

    ip_address appears only once the guest really answers. problems are sentences.
    """

    name: str
    state: VmState
    os: GuestOs
    cpu_count: int
    memory_bytes: int
    disk_total_bytes: int
    disk_allocated_bytes: int
    display: Display
    location_name: str
    network: str
    uuid: str | None = None
    mac_address: str | None = None
    image: str | None = None
    architecture: str | None = None
    firmware: str | None = None
    created_at: str | None = None
    ip_address: str | None = None
    ssh_available: bool | None = None
    guest_agent: bool = False
    vnc_port: int | None = None
    vnc_password: str | None = None
    shared_directories: tuple[SharedDirectory, ...] = ()
    forwards: tuple[Forward, ...] = ()
    accelerator: str | None = None
    started_at: str | None = None
    recovery_mode: bool = False
    disks: tuple[AttachedDisk, ...] = ()
    usb_storage: tuple[AttachedDisk, ...] = ()
    problems: tuple[str, ...] = ()
    operation: str | None = None
    operation_action: str | None = None
    download_progress: float | None = None
    last_end: MachineEnd | None = None
