"""What a VM is, at rest: the facts that its configuration files hold."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum


class GuestOs(StrEnum):
    """The guest's system, spelt as the API spells it."""

    MACOS = "macOS"
    LINUX = "linux"


class Architecture(StrEnum):
    """What a guest's processor is, in the words of registries (Go's GOARCH)."""

    AMD64 = "amd64"
    ARM64 = "arm64"


class VmState(StrEnum):
    """The state words of the API; computed from disk and kernel, never stored.

    `starting` and `running` both have a machine; `crashed` is a machine that ended unasked;
    `broken` is a VM whose own files cannot be read.
    """

    PROVISIONING = "provisioning"
    PULLING = "pulling"
    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    UNRESPONSIVE = "unresponsive"
    CRASHED = "crashed"
    BROKEN = "broken"


class Firmware(StrEnum):
    """What boots the disk: SeaBIOS, or UEFI (OVMF; AAVMF for arm64)."""

    BIOS = "bios"
    UEFI = "uefi"


class DiskFormat(StrEnum):
    """Image formats that lumed opens; always named to QEMU, never probed by it."""

    RAW = "raw"
    QCOW2 = "qcow2"


@dataclass(frozen=True, slots=True)
class Display:
    """A screen size in pixels; str() is the API's form, "1024x768"."""

    width: int = 1024
    height: int = 768

    @classmethod
    def parse(cls, text: object) -> Display:
        """Read "1024x768", 64 to 16384 pixels a side; ValueError otherwise."""
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text) if isinstance(text, str) else None
        width, height = (int(match[1]), int(match[2])) if match else (0, 0)
        if not (64 <= width <= 16384 and 64 <= height <= 16384):
            raise ValueError(f"{text!r:.60} is not a display size; write it as 1024x768")
        return cls(width, height)

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True, slots=True)
class PortForward:
    """A guest port that the user wants to reach; host_port None: the same number if possible."""

    guest_port: int
    host_port: int | None = None
    protocol: str = "tcp"


@dataclass(frozen=True, slots=True)
class VmConfig:
    """What a VM is. `config.json` holds Lume's part of it, `lumed.json` the rest.

    disk_size_bytes is the virtual size. image names what the disk was made from, None for an
    empty disk. network is "nat", "bridged", or "bridged:<interface>". is_clone: its guest was
    another VM's once, and must become a machine of its own.
    """

    uuid: str
    os: GuestOs
    cpu_count: int
    memory_bytes: int
    disk_size_bytes: int
    display: Display
    mac_address: str
    network: str = "nat"
    architecture: Architecture = Architecture.AMD64
    firmware: Firmware = Firmware.UEFI
    image: str | None = None
    ports: tuple[PortForward, ...] = field(default=())
    ssh_keys: tuple[str, ...] = field(default=())
    user_data: str | None = None
    created_at: str = ""
    is_clone: bool = False
