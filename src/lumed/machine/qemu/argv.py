"""QEMU's command line, as a pure function of the machine.

Formats are always named and every path is absolute. Devices and block nodes are given as JSON,
in which no character of a path needs escaping. See qemu(1).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lumed.machine.spec import MachineSpec
from lumed.model.run import FIRST_VNC_PORT
from lumed.model.vm import Architecture, Firmware
from lumed.units import MIB

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
AGENT_PORT = "org.qemu.guest_agent.0"
_USB_PORTS = 16  # of each speed
_MACHINES = {
    Architecture.AMD64: "q35,vmport=off",
    # Version 3 of the interrupt controller: version 2, the default, serves 8 processors.
    Architecture.ARM64: "virt,gic-version=3",
}


@dataclass(frozen=True, slots=True)
class SocketFds:
    """Listening unix sockets that we made and QEMU takes over by descriptor."""

    monitor: int
    second_monitor: int
    agent: int
    serial: int

    def all(self) -> tuple[int, ...]:
        """The descriptors to pass on."""
        return (self.monitor, self.second_monitor, self.agent, self.serial)


def build_argv(
    spec: MachineSpec,
    *,
    qemu: Path,
    accelerator: list[str],
    uefi_code: Path | None,
    sockets: SocketFds,
) -> list[str]:
    """The whole command line; no secret is in it."""
    argv = [str(qemu), "-name", f"guest={spec.name},debug-threads=on", "-uuid", spec.uuid]
    argv += ["-nodefaults", "-no-user-config", "-sandbox", SANDBOX, "-msg", "timestamp=on"]
    machine = _MACHINES[spec.architecture]
    if any(share.needs_shared_memory for share in spec.shares):
        argv += ["-object", f"memory-backend-memfd,id=ram,share=on,size={spec.memory_bytes}"]
        machine += ",memory-backend=ram"
    if spec.firmware is Firmware.UEFI:
        machine += ",pflash0=uefi-code,pflash1=uefi-vars"
        argv += _file_node("uefi-code", uefi_code, "raw", read_only=True)
        argv += _file_node("uefi-vars", spec.uefi_vars, "qcow2")
    argv += ["-machine", machine, *accelerator]
    argv += ["-smp", str(spec.cpu_count), "-m", f"{spec.memory_bytes // MIB}M", "-rtc", "base=utc"]
    argv += _chardevs(spec, sockets)
    if spec.usb_storage or spec.architecture is Architecture.ARM64:
        # p2 and p3: how many ports it has, where four are the default.
        argv += _device("qemu-xhci", p2=_USB_PORTS, p3=_USB_PORTS)
    argv += _disks(spec)
    argv += _console(spec)
    if spec.direct_kernel is not None:
        direct = spec.direct_kernel
        argv += ["-kernel", str(direct.kernel), "-initrd", str(direct.initramfs)]
        argv += ["-append", direct.command_line]
    if spec.network is not None:
        argv += ["-netdev", f"{spec.network.netdev},id=net0"]
        # The option ROM would try to boot from the network for seconds when no disk boots.
        argv += _device("virtio-net-pci", netdev="net0", mac=spec.mac_address, romfile="")
    for share in spec.shares:
        argv += share.argv
    return argv


def _chardevs(spec: MachineSpec, sockets: SocketFds) -> list[str]:
    argv: list[str] = []
    for name, fd in (("qmp0", sockets.monitor), ("qmp1", sockets.second_monitor)):
        argv += ["-chardev", f"socket,id={name},fd={fd},server=on,wait=off"]
        argv += ["-mon", f"chardev={name},mode=control"]
    serial_log = str(spec.serial_log).replace(",", ",,")
    argv += [
        "-chardev",
        f"socket,id=serial0,fd={sockets.serial},server=on,wait=off,logfile={serial_log},logappend=on",
        "-serial",
        "chardev:serial0",
        "-chardev",
        f"socket,id=agent0,fd={sockets.agent},server=on,wait=off",
    ]
    argv += _device("virtio-serial-pci", id="serialbus")
    argv += _device("virtserialport", id="agent", chardev="agent0", name=AGENT_PORT)
    return argv


def _disks(spec: MachineSpec) -> list[str]:
    argv = _file_node("disk0", spec.disk, spec.disk_format.value, discard="unmap")
    argv += _device("virtio-blk-pci", drive="disk0", serial="disk0", bootindex=1)
    if spec.iso is not None:
        # An installer boots before the disk; an ISO that does not boot is passed over.
        argv += _file_node("iso0", spec.iso, "raw", read_only=True)
        if spec.architecture is Architecture.ARM64:
            argv += _device("virtio-scsi-pci", id="scsi0")
            argv += _device("scsi-cd", drive="iso0", bootindex=0)
        else:
            argv += _device("ide-cd", drive="iso0", bootindex=0)
    for number, disk in enumerate(spec.disks, 1):
        name = f"disk{number}"
        argv += _file_node(name, Path(disk.path), disk.format.value, discard="unmap")
        argv += _device("virtio-blk-pci", drive=name, serial=name)
    if spec.seed is not None:
        argv += _file_node("seed0", spec.seed, "raw", read_only=True)
        argv += _device("virtio-blk-pci", drive="seed0", serial="seed0")
    for number, disk in enumerate(spec.usb_storage):
        name = f"usb{number}"
        argv += _file_node(name, Path(disk.path), disk.format.value, read_only=True)
        argv += _device("usb-storage", drive=name, serial=name, removable=True)
    return argv


def _console(spec: MachineSpec) -> list[str]:
    size = {"xres": spec.display.width, "yres": spec.display.height, "edid": True}
    if spec.architecture is Architecture.ARM64:
        # A kernel without its driver (Debian's cloud kernel) lets the screen go dark; ramfb, which
        # shows that one's console, knows neither this size nor a change of it.
        argv = _device("virtio-gpu-pci", **size)
        # AAVMF reads no virtio keyboard.
        argv += _device("usb-kbd") + _device("usb-tablet")
    else:
        argv = _device("VGA", **size, vgamem_mb=64)
        argv += _device("virtio-keyboard-pci") + _device("virtio-tablet-pci")
    argv += _device("virtio-rng-pci") + _device("virtio-balloon-pci")
    if spec.vnc_password is None:
        argv += ["-vnc", "none"]
    else:
        # QEMU picks the first free port itself; the password comes later, over the monitor,
        # and until then nobody can log in. Most viewers ask to be the only one: that would end
        # the connection of an agent at work (and with force-shared such a viewer is refused).
        where = "0,to=2000" if spec.vnc_port is None else str(spec.vnc_port - FIRST_VNC_PORT)
        argv += ["-vnc", f"127.0.0.1:{where},password=on,share=ignore"]
    return argv


def _file_node(
    node_name: str, path: Path | None, format_name: str, *, read_only: bool = False, **more: object
) -> list[str]:
    if path is None:
        raise ValueError(f"{node_name} has no file")
    return _json(
        "-blockdev",
        driver=format_name,
        **{"node-name": node_name, "read-only": read_only, **more},
        file={"driver": "file", "filename": str(path), "read-only": read_only, **more},
    )


def _device(driver: str, **properties: object) -> list[str]:
    return _json("-device", driver=driver, **properties)


def _json(option: str, **properties: object) -> list[str]:
    return [option, json.dumps(properties, separators=(",", ":"))]
