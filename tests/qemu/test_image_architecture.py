"""Finding a disk's architecture, on file systems made by mtools."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

import pytest

from lumed.images.architecture import find_architecture, find_architecture_of
from lumed.images.local import ImageCache
from lumed.model.vm import Architecture, DiskFormat, Firmware
from lumed.units import MIB

GPT_ENTRY = bytes.fromhex("28732ac11ff8d211ba4b00a0c93ec93b")
SIZES = {"fat12": (2, ()), "fat16": (32, ()), "fat32": (80, ("-F",))}
ARM = {"BOOTAA64.EFI": b"MZ"}


def write_fat(disk: Path, start: int, kind: str, files: dict[str, bytes]) -> None:
    """A file system at byte `start`, with other directories before the one that matters."""
    size, options = SIZES[kind]
    if not disk.exists():
        disk.touch()
    os.truncate(disk, start + size * MIB)
    image = f"{disk}@@{start}"
    geometry = ("-T", str(size * 2048), "-h", "64", "-s", "32")
    run("mformat", "-i", image, *options, *geometry, "-v", "ESP", "::")
    with disk.open("rb") as file:
        file.seek(start)
        assert kind.upper().encode() in file.read(512)
    folders = [f"::/loader and more {number}" for number in range(40)]
    run("mmd", "-i", image, *folders, "::/EFI", "::/EFI/debian", "::/EFI/BOOT")
    # A directory of more than one cluster, with long names between the short ones.
    for number in range(20):
        run("mcopy", "-i", image, "-", f"::/EFI/BOOT/some other file {number}", stdin=b"x")
    for name, content in files.items():
        run("mcopy", "-i", image, "-", f"::/EFI/BOOT/{name}", stdin=content)


def write_gpt(disk: Path, start: int) -> None:
    with disk.open("r+b") as file:
        protective = struct.pack("<B3sB3sII", 0, b"", 0xEE, b"", 1, 0xFFFFFFFF)
        file.write(bytes(446) + protective + bytes(48) + b"\x55\xaa")
        header = bytearray(512)
        header[:8] = b"EFI PART"
        struct.pack_into("<QII", header, 72, 2, 128, 128)
        # The first partition is another one.
        other = bytes(range(16)) + bytes(16) + struct.pack("<QQ", 34, 2047)
        system = GPT_ENTRY + bytes(16) + struct.pack("<QQ", start // 512, start // 512 + 2048)
        file.write(bytes(header) + other.ljust(128, b"\0") + system.ljust(128, b"\0"))


def write_mbr(disk: Path, start: int) -> None:
    with disk.open("r+b") as file:
        entry = struct.pack("<B3sB3sII", 0, b"", 0xEF, b"", start // 512, 4096)
        file.write(bytes(446) + entry + bytes(48) + b"\x55\xaa")


def run(*argv: str | Path, stdin: bytes | None = None) -> None:
    subprocess.run(argv, check=True, input=stdin, timeout=30, capture_output=True)


def to_qcow2(disk: Path) -> Path:
    target = disk.with_suffix(".qcow2")
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", disk, target)
    return target


@pytest.mark.parametrize("kind", list(SIZES))
def test_an_arm64_disk_is_found_in_each_kind_of_file_system(kind: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    write_fat(disk, MIB, kind, ARM)
    write_gpt(disk, MIB)
    assert find_architecture_of(disk, DiskFormat.RAW) is Architecture.ARM64
    assert find_architecture_of(to_qcow2(disk), DiskFormat.QCOW2) is Architecture.ARM64


def test_the_table_may_be_an_mbr_or_none(tmp_path: Path) -> None:
    disk = tmp_path / "mbr.raw"
    write_fat(disk, 3 * MIB + 512, "fat12", ARM)
    write_mbr(disk, 3 * MIB + 512)
    assert find_architecture_of(disk, DiskFormat.RAW) is Architecture.ARM64
    assert find_architecture_of(to_qcow2(disk), DiskFormat.QCOW2) is Architecture.ARM64
    bare = tmp_path / "bare.raw"
    write_fat(bare, 0, "fat16", ARM)
    assert find_architecture_of(bare, DiskFormat.RAW) is Architecture.ARM64


def test_a_disk_for_both_is_taken_as_amd64_and_one_for_neither_as_unknown(tmp_path: Path) -> None:
    both, neither = tmp_path / "both.raw", tmp_path / "neither.raw"
    write_fat(both, 0, "fat12", {**ARM, "bootx64.efi": b"MZ"})
    write_fat(neither, 0, "fat12", {"BOOTRISCV64.EFI": b"MZ"})
    assert find_architecture_of(both, DiskFormat.RAW) is Architecture.AMD64
    assert find_architecture_of(neither, DiskFormat.RAW) is None


def test_a_directory_that_runs_in_a_circle_comes_to_an_end(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    write_fat(disk, 0, "fat16", {})
    content = bytearray(disk.read_bytes())
    reads = 0
    # Every cluster of the table is followed by cluster 3, and no directory ends.
    (reserved,) = struct.unpack_from("<H", content, 14)
    (fat_sectors,) = struct.unpack_from("<H", content, 22)
    content[reserved * 512 : (reserved + fat_sectors) * 512] = b"\3\0" * (fat_sectors * 256)

    def read(offset: int, length: int) -> bytes:
        nonlocal reads
        reads += 1
        return bytes(content[offset : offset + length]).replace(b"\0" * 32, b"\xe5" * 32)

    assert find_architecture(read) is None
    assert reads < 1000


def test_a_disk_that_cannot_be_read_is_unknown(tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    disk.write_bytes(b"no qcow2")
    assert find_architecture_of(disk, DiskFormat.QCOW2) is None


async def test_an_imported_image_knows_its_architecture_and_boots_by_uefi(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    write_fat(disk, MIB, "fat12", ARM)
    write_mbr(disk, MIB)
    with disk.open("r+b") as file:
        # Boot code, and a partition of the other kind that is active, as parted leaves it.
        file.write(b"\xfa\xeb\x63\x90")
        file.seek(462)
        file.write(struct.pack("<B3sB3sII", 0x80, b"", 0x83, b"", 8192, 2048))
    image = await ImageCache(tmp_path / "cache", {}).import_file(disk, lambda *_: None)
    assert image.about.architecture is Architecture.ARM64
    assert image.facts.firmware is Firmware.UEFI
