"""What a machine is made of: everything that a driver needs to start one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lumed.machine.shares import ShareDevice
from lumed.model.run import AttachedDisk, NetDevice
from lumed.model.vm import Architecture, DiskFormat, Display, Firmware


@dataclass(frozen=True, slots=True)
class DirectKernel:
    """A kernel that is started without the disk's boot loader (recovery)."""

    kernel: Path
    initramfs: Path
    command_line: str


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """One machine. All paths are absolute; runtime_dir is private to this VM and short.

    uefi_vars is made by the driver if it is missing. network None is a machine without a card.
    vnc_password None is one without VNC; the password reaches it only through its monitor.
    vnc_port None is any free one; others begin at 5900. The guest only reads from usb_storage.
    lock_fd is the descriptor whose lock the machine keeps.
    """

    uuid: str
    name: str
    cpu_count: int
    memory_bytes: int
    firmware: Firmware
    disk: Path
    disk_format: DiskFormat
    display: Display
    mac_address: str
    runtime_dir: Path
    log: Path
    serial_log: Path
    architecture: Architecture = Architecture.AMD64
    uefi_vars: Path | None = None
    seed: Path | None = None
    iso: Path | None = None
    disks: tuple[AttachedDisk, ...] = ()
    usb_storage: tuple[AttachedDisk, ...] = ()
    direct_kernel: DirectKernel | None = None
    network: NetDevice | None = None
    shares: tuple[ShareDevice, ...] = field(default=())
    vnc_password: str | None = None
    vnc_port: int | None = None
    lock_fd: int | None = None
