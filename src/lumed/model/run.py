"""What a run is: the options it was asked with, and what the machine got."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from lumed.model.vm import DiskFormat

# VNC's display 0; QEMU counts its ports from there on.
FIRST_VNC_PORT = 5900


@dataclass(frozen=True, slots=True)
class SharedDirectory:
    """A host directory that the guest sees. host_path is absolute and resolved."""

    host_path: str
    read_only: bool
    tag: str


class ShareTransport(StrEnum):
    """How a shared directory reaches the guest: virtiofs is faster, 9p needs no helper."""

    VIRTIOFS = "virtiofs"
    NINEP = "9p"


@dataclass(frozen=True, slots=True)
class Forward:
    """A host address and port that lead to a guest port."""

    guest_port: int
    address: str
    port: int
    protocol: str = "tcp"


@dataclass(frozen=True, slots=True)
class NetDevice:
    """What QEMU needs for one network card's back end.

    netdev is the value of -netdev without its id (for example "stream,server=off,
    addr.type=fd,addr.str=7"); pass_fds must be inherited by QEMU under the same numbers.
    address is where clients reach the guest, known up front only with user networking.
    problem is told to the user when the network is less than was asked for.
    """

    netdev: str
    pass_fds: tuple[int, ...] = ()
    address: str | None = None
    forwards: tuple[Forward, ...] = ()
    problem: str | None = None


class VncMode(StrEnum):
    """Whether the machine's screen can be reached over VNC."""

    ENABLED = "enabled"
    DISABLED = "disabled"


@dataclass(frozen=True, slots=True)
class AttachedDisk:
    """A disk image of the user's that a run has beside the VM's own disk. path is resolved."""

    path: str
    format: DiskFormat


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a VM was asked to run, checked and with paths resolved.

    The guest writes to disks, and only reads from usb_storage. vnc_port None is any free one,
    vnc_password None a new one.
    """

    no_display: bool = True
    shared_directories: tuple[SharedDirectory, ...] = field(default=())
    recovery_mode: bool = False
    mount: str | None = None
    network: str | None = None
    vnc: VncMode = VncMode.ENABLED
    vnc_port: int | None = None
    vnc_password: str | None = field(default=None, repr=False)
    disks: tuple[AttachedDisk, ...] = ()
    usb_storage: tuple[AttachedDisk, ...] = ()
