"""The folder of one VM, and the two files that say what it is.

`config.json` has Lume's keys, so that a tool for Lume's folders can read it; `lumed.json` has
what Lume knows nothing of. Both are replaced atomically.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from lumed.errors import Damaged
from lumed.files import read_json_object, write_json
from lumed.model.vm import Architecture, Display, Firmware, GuestOs, PortForward, VmConfig

STAGING = ".staging"
TRASH = ".trash"


@dataclass(frozen=True, slots=True)
class VmDir:
    """Names of the files in a VM's folder."""

    path: Path

    @property
    def name(self) -> str:
        """The VM's name is its folder's."""
        return self.path.name

    @property
    def config(self) -> Path:
        """Lume's part of the configuration."""
        return self.path / "config.json"

    @property
    def extra(self) -> Path:
        """lumed's part of the configuration."""
        return self.path / "lumed.json"

    @property
    def disk(self) -> Path:
        """The disk, always qcow2."""
        return self.path / "disk.qcow2"

    @property
    def image_link(self) -> Path:
        """A second name of the image's disk, so that the kernel knows it is in use; may be absent.

        The disk itself names the image by its path in the cache.
        """
        return self.path / "image.link"

    @property
    def uefi_vars(self) -> Path:
        """UEFI variables, qcow2 so that snapshots can hold them."""
        return self.path / "uefi-vars.qcow2"

    @property
    def seed(self) -> Path:
        """The NoCloud seed, made anew at each run."""
        return self.path / "seed.iso"

    @property
    def run_lock(self) -> Path:
        """Held by the running machine."""
        return self.path / "run.lock"

    @property
    def run_record(self) -> Path:
        """How to reach the running machine."""
        return self.path / "run.json"

    @property
    def end_record(self) -> Path:
        """How the last machine ended."""
        return self.path / "end.json"

    @property
    def serial_log(self) -> Path:
        """What the guest printed on its serial console in this run."""
        return self.path / "serial.log"

    @property
    def qemu_log(self) -> Path:
        """What QEMU and its helpers printed in this run."""
        return self.path / "qemu.log"


def read_config(vm_dir: VmDir) -> VmConfig:
    """What the VM is. Raises Damaged with the reason; nothing is changed then."""
    try:
        lume = read_json_object(vm_dir.config)
        extra = read_json_object(vm_dir.extra)
        return VmConfig(
            # A folder is named after it, and it goes into QEMU's command line.
            uuid=str(UUID(_text(extra, "uuid"))),
            os=_guest_os(_text(lume, "os")),
            cpu_count=_number(lume, "cpuCount"),
            memory_bytes=_number(lume, "memorySize"),
            disk_size_bytes=_number(lume, "diskSize"),
            display=Display.parse(_text(lume, "display")),
            mac_address=_mac_address(lume),
            network=_optional_text(lume, "networkMode") or "nat",
            architecture=_architecture(extra),
            firmware=Firmware(_text(extra, "firmware")),
            image=_optional_text(extra, "image"),
            ports=tuple(map(_port, _list(extra, "ports"))),
            ssh_keys=tuple(map(str, _list(extra, "sshKeys"))),
            user_data=_optional_text(extra, "userData"),
            created_at=_optional_text(extra, "createdAt") or "",
            is_clone=extra.get("isClone") is True,
        )
    except OSError as error:
        raise Damaged(
            f"The VM {vm_dir.name} cannot be read: {error.strerror}: {error.filename}"
        ) from error
    except ValueError as error:
        raise Damaged(
            f"The VM {vm_dir.name} cannot be read: {error}",
            hint=f"mend {vm_dir.config} and {vm_dir.extra}; nothing else of the VM was touched",
        ) from error


def write_config(vm_dir: VmDir, config: VmConfig) -> None:
    """Write both files. Raises NoSpace; each file is then the old or the new one."""
    write_json(
        vm_dir.extra,
        {
            "version": 1,
            "uuid": config.uuid,
            "driver": "qemu",
            "architecture": config.architecture.value,
            "firmware": config.firmware.value,
            "image": config.image,
            "ports": [{"guestPort": p.guest_port, "hostPort": p.host_port} for p in config.ports],
            "sshKeys": list(config.ssh_keys),
            "userData": config.user_data,
            "createdAt": config.created_at,
            "isClone": config.is_clone,
        },
    )
    write_json(
        vm_dir.config,
        {
            "os": config.os.value,
            "cpuCount": config.cpu_count,
            "memorySize": config.memory_bytes,
            "diskSize": config.disk_size_bytes,
            "macAddress": config.mac_address,
            "display": str(config.display),
            "networkMode": config.network,
        },
    )


def _guest_os(text: str) -> GuestOs:
    return GuestOs.MACOS if text.lower() in ("macos", "darwin") else GuestOs(text.lower())


def _architecture(data: dict[str, object]) -> Architecture:
    # A VM that an earlier version made does not say.
    return Architecture(_optional_text(data, "architecture") or Architecture.AMD64)


def _text(data: dict[str, object], key: str) -> str:
    value = data.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key} is missing or no text")
    return value


def _optional_text(data: dict[str, object], key: str) -> str | None:
    return None if data.get(key) is None else _text(data, key)


def _mac_address(data: dict[str, object]) -> str:
    value = _text(data, "macAddress")
    if not re.fullmatch(r"([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}", value):
        raise ValueError(f"macAddress is {value!r:.40}, which is none")
    return value


def _list(data: dict[str, object], key: str) -> list[object]:
    value = data.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(f"{key} is no list")
    return value


def _port(value: object) -> PortForward:
    if not isinstance(value, dict):
        raise ValueError("ports holds something that is no object")
    host_port = None if value.get("hostPort") is None else _number(value, "hostPort")
    return PortForward(_number(value, "guestPort"), host_port)


def _number(data: dict[str, object], key: str) -> int:
    value = data.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{key} is missing or no positive number")
    return value
