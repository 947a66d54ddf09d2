"""QEMU's command line: what must be in it for every machine, and what never may be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lumed.machine.qemu.argv import SocketFds, build_argv
from lumed.machine.shares import ShareDevice
from lumed.machine.spec import DirectKernel, MachineSpec
from lumed.model.run import AttachedDisk, NetDevice, SharedDirectory, ShareTransport
from lumed.model.vm import Architecture, DiskFormat, Display, Firmware

SPEC = MachineSpec(
    uuid="e26796aa-5ff1-435d-8e69-bf0b4566cbab",
    name="web",
    cpu_count=2,
    memory_bytes=256 * 1024**2,
    firmware=Firmware.BIOS,
    disk=Path("/vms/web, mine/disk.qcow2"),
    disk_format=DiskFormat.QCOW2,
    display=Display(800, 600),
    mac_address="52:54:00:00:00:01",
    runtime_dir=Path("/run/vm"),
    log=Path("/vms/web/qemu.log"),
    serial_log=Path("/vms/web, mine/serial.log"),
    vnc_password="sesame12",
)
VARS = Path("/vms/web/vars.qcow2")
ARM_SPEC = replace(SPEC, architecture=Architecture.ARM64, firmware=Firmware.UEFI, uefi_vars=VARS)


def build(spec: MachineSpec) -> list[str]:
    return build_argv(
        spec,
        qemu=Path("/usr/bin/qemu-system-x86_64"),
        accelerator=["-accel", "tcg"],
        uefi_code=Path("/usr/share/OVMF/OVMF_CODE_4M.fd"),
        sockets=SocketFds(10, 11, 12, 13),
    )


def options(argv: list[str], name: str) -> list[str]:
    return [argv[at + 1] for at, part in enumerate(argv) if part == name]


def nodes(argv: list[str]) -> dict[str, dict[str, object]]:
    return {n["node-name"]: n for n in map(json.loads, options(argv, "-blockdev"))}


@pytest.mark.parametrize(
    "spec",
    [SPEC, replace(SPEC, firmware=Firmware.UEFI, uefi_vars=VARS), ARM_SPEC],
    ids=["bios", "uefi", "arm64"],
)
def test_every_machine_is_closed_in(spec: MachineSpec) -> None:
    argv = build(spec)
    assert {"-nodefaults", "-no-user-config"} <= set(argv)
    assert options(argv, "-sandbox") == [
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    ]
    assert not any("sesame12" in part for part in argv)
    assert options(argv, "-vnc") == ["127.0.0.1:0,to=2000,password=on,share=ignore"]


@pytest.mark.parametrize("spec", [SPEC, ARM_SPEC], ids=["amd64", "arm64"])
def test_disks_of_the_user_come_before_the_seed_and_usb_sticks_are_read_only(
    spec: MachineSpec,
) -> None:
    raw = AttachedDisk("/srv/a, b.img", DiskFormat.RAW)
    qcow2 = AttachedDisk("/srv/c.qcow2", DiskFormat.QCOW2)
    seed = Path("/seed.iso")
    argv = build(replace(spec, seed=seed, disks=(raw, qcow2), usb_storage=(raw, qcow2)))
    devices = [json.loads(text) for text in options(argv, "-device")]
    drives = [d["drive"] for d in devices if d["driver"] == "virtio-blk-pci"]
    assert drives == ["disk0", "disk1", "disk2", "seed0"]
    assert [d["drive"] for d in devices if d["driver"] == "usb-storage"] == ["usb0", "usb1"]
    # The controller comes first, once.
    drivers = [d["driver"] for d in devices]
    assert drivers.count("qemu-xhci") == 1
    assert drivers.index("qemu-xhci") < drivers.index("usb-storage")
    for number, disk in ((1, raw), (2, qcow2)):
        node, usb = nodes(argv)[f"disk{number}"], nodes(argv)[f"usb{number - 1}"]
        assert (node["driver"], node["read-only"]) == (disk.format, False)
        assert (usb["driver"], usb["read-only"]) == (disk.format, True)
        assert usb["file"] == {"driver": "file", "filename": disk.path, "read-only": True}


def test_a_vnc_port_is_taken_as_asked() -> None:
    assert options(build(replace(SPEC, vnc_port=5977)), "-vnc") == [
        "127.0.0.1:77,password=on,share=ignore"
    ]


def test_formats_are_named_and_paths_need_no_escaping() -> None:
    argv = build(replace(SPEC, iso=Path("/a,b.iso"), seed=Path("/seed.iso")))
    assert nodes(argv)["disk0"]["driver"] == "qcow2"
    assert nodes(argv)["disk0"]["file"] == {
        "driver": "file",
        "filename": "/vms/web, mine/disk.qcow2",
        "read-only": False,
        "discard": "unmap",
    }
    for name in ("iso0", "seed0"):
        assert nodes(argv)[name]["driver"] == "raw"
        assert nodes(argv)[name]["read-only"] is True
    (serial,) = [part for part in argv if "logfile=" in part]
    assert "logfile=/vms/web,, mine/serial.log," in serial


def test_the_installer_boots_before_the_disk() -> None:
    argv = build(replace(SPEC, iso=Path("/a.iso")))
    devices = [json.loads(d) for d in options(argv, "-device")]
    order = {d["drive"]: d["bootindex"] for d in devices if "bootindex" in d}
    assert order == {"iso0": 0, "disk0": 1}


def devices(argv: list[str]) -> set[str]:
    return {json.loads(device)["driver"] for device in options(argv, "-device")}


def test_an_arm64_machine_is_made_of_what_its_kind_has() -> None:
    argv = build(replace(ARM_SPEC, iso=Path("/a.iso")))
    assert options(argv, "-machine") == ["virt,gic-version=3,pflash0=uefi-code,pflash1=uefi-vars"]
    screen, *_ = (d for d in map(json.loads, options(argv, "-device")) if "xres" in d)
    assert (screen["driver"], screen["xres"], screen["yres"]) == ("virtio-gpu-pci", 800, 600)
    extra = devices(argv) - devices(build(replace(SPEC, iso=Path("/a.iso"))))
    assert extra == {
        *("virtio-gpu-pci", "qemu-xhci", "usb-kbd", "usb-tablet"),
        *("virtio-scsi-pci", "scsi-cd"),
    }
    assert not {"VGA", "ide-cd", "virtio-keyboard-pci", "virtio-tablet-pci"} & devices(argv)


def test_a_machine_without_network_or_screen_has_neither() -> None:
    argv = build(replace(SPEC, vnc_password=None))
    assert options(argv, "-vnc") == ["none"]
    assert options(argv, "-netdev") == []
    argv = build(replace(SPEC, network=NetDevice("stream,server=off,addr.type=fd,addr.str=9")))
    assert options(argv, "-netdev") == ["stream,server=off,addr.type=fd,addr.str=9,id=net0"]


def test_virtiofs_gets_memory_that_it_can_share() -> None:
    directory = SharedDirectory("/docs", read_only=False, tag="docs")
    share = ShareDevice(directory, ShareTransport.VIRTIOFS, ("-x",), needs_shared_memory=True)
    argv = build(replace(SPEC, shares=(share,)))
    assert options(argv, "-object") == ["memory-backend-memfd,id=ram,share=on,size=268435456"]
    assert options(argv, "-machine") == ["q35,vmport=off,memory-backend=ram"]
    assert "-x" in argv


def test_recovery_boots_a_kernel_of_its_own() -> None:
    direct = DirectKernel(Path("/k"), Path("/i"), "console=ttyS0")
    argv = build(replace(SPEC, direct_kernel=direct))
    assert [options(argv, name) for name in ("-kernel", "-initrd", "-append")] == [
        ["/k"],
        ["/i"],
        ["console=ttyS0"],
    ]
