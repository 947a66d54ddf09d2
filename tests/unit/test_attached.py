"""Disk images that a user names for a run: none is taken for what it is not."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from lumed.errors import InvalidField
from lumed.model.run import AttachedDisk
from lumed.model.vm import DiskFormat
from lumed.service.attached import check_disks, check_vnc_port


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The VM's own disk."""
    return make(tmp_path / "own.qcow2", "qcow2")


def make(path: Path, kind: str = "raw", *options: str) -> Path:
    size = () if "-b" in options else ("1M",)
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, *options, path, *size], check=True)
    return path


def make_iso(path: Path) -> Path:
    path.write_bytes(bytes(0x8001) + b"CD001" + bytes(4096))
    return path


def test_formats_are_found_and_links_resolved(own: Path, tmp_path: Path) -> None:
    raw, qcow2 = make(tmp_path / "raw.img"), make(tmp_path / "any", "qcow2")
    link = tmp_path / "link.img"
    link.symlink_to(raw)
    disks, sticks = check_disks([str(link)], [str(qcow2)], own)
    assert disks == (AttachedDisk(str(raw), DiskFormat.RAW),)
    assert sticks == (AttachedDisk(str(qcow2), DiskFormat.QCOW2),)


def test_an_iso_is_a_stick_and_no_disk(own: Path, tmp_path: Path) -> None:
    iso = str(make_iso(tmp_path / "live.iso"))
    _, sticks = check_disks([], [iso], own)
    assert sticks == (AttachedDisk(iso, DiskFormat.RAW),)
    with pytest.raises(InvalidField, match="it is an ISO"):
        check_disks([iso], [], own)


@pytest.mark.parametrize("field", ["disks", "usbStorage"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere", "does not exist"),
        ("", "is a directory"),
        ("small", "too small"),
        ("overlay", "backing file"),
        ("twice", "named twice"),
        ("own.qcow2", "the VM's own disk"),
        ("forged.raw", "begins with a qcow2 header"),
        ("relative", "is not absolute"),
    ],
)
def test_what_is_no_disk_of_its_own_is_refused(
    own: Path, tmp_path: Path, field: str, name: str, reason: str
) -> None:
    (tmp_path / "small").write_bytes(b"text\n")
    make(tmp_path / "overlay", "qcow2", "-b", str(own), "-F", "qcow2")
    (tmp_path / "forged.raw").write_bytes(own.read_bytes())
    (tmp_path / "twice").hardlink_to(make(tmp_path / "once"))
    texts = [str(tmp_path / "once"), name if name == "relative" else f"{tmp_path}/{name}"]
    given = (texts, []) if field == "disks" else ([], texts)
    with pytest.raises(InvalidField, match=reason) as caught:
        check_disks(*given, own)
    assert set(caught.value.fields) == {field}


def test_a_write_protected_file_is_no_disk_to_write_to(own: Path, tmp_path: Path) -> None:
    # As the images are that VMs rest on; root could write to them.
    image = make(tmp_path / "image")
    image.chmod(0o444)
    check_disks([], [str(image)], own)
    with pytest.raises(InvalidField, match="write-protected"):
        check_disks([str(image)], [], own)


def test_a_vm_whose_own_disk_is_gone_is_told_by_its_start(tmp_path: Path) -> None:
    assert check_disks([], [], tmp_path / "gone") == ((), ())


def test_a_taken_vnc_port_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidField, match=f"{port} is in use"):
            check_vnc_port(port)
    check_vnc_port(port)
