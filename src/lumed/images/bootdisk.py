"""A disk that boots one kernel, by BIOS and by UEFI alike, made without root.

A FAT partition holds the kernel. BIOS: SYSLINUX, which had the guest ready 3.3 s after QEMU's
start where GRUB took 6.4 s (software emulation; GRUB reads the disk far slower). UEFI:
systemd-boot, as fast as GRUB, SYSLINUX and a unified kernel image (7.5 to 7.8 s, of which the
firmware 4 s), and alone in needing no tool to put it together.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from lumed.osproc import run_tool_blocking

# Where the boot loaders and the tools that write them come from; they run where unpacked.
PACKAGES = ("mtools", "syslinux", "syslinux-common", "systemd-boot-efi")

LABEL = "LUMEDTINY"
SECTOR = 512
FIRST_SECTOR = 2048  # the usual alignment of 1 MiB
_EFI_SYSTEM = 0xEF
# Same inputs, same bytes: a fixed volume serial, and one moment for every file.
_SERIAL = "4c554d45"
_EPOCH = 1_700_000_000

_SYSLINUX = """\
SERIAL 0 115200
DEFAULT linux
PROMPT 0
TIMEOUT 0
LABEL linux
  LINUX /vmlinuz
  INITRD /initramfs
  APPEND {arguments}
"""
_LOADER = "timeout 0\n"
_ENTRY = """\
title lumed
linux /vmlinuz
initrd /initramfs
options {arguments}
"""


def write_boot_disk(
    disk: Path, *, size_bytes: int, kernel: Path, initramfs: Path, arguments: str, tools: Path
) -> None:
    """Write `disk`, raw and sparse, with an MBR; `tools` is where PACKAGES were unpacked.

    The partition takes the whole disk (a multiple of 1 MiB) and keeps its free space for the
    guest. Raises ToolFailed if a tool does, for instance for want of space.
    """
    sectors = size_bytes // SECTOR - FIRST_SECTOR
    with disk.open("wb") as image:
        image.truncate(size_bytes)
        image.write((tools / "usr/lib/syslinux/mbr/mbr.bin").read_bytes())
        image.seek(446)
        # Cylinders and heads say "see the sector numbers"; bootable, for the code just written.
        everywhere = b"\xfe\xff\xff"
        kind = _EFI_SYSTEM
        image.write(
            struct.pack("<B3sB3sII", 0x80, everywhere, kind, everywhere, FIRST_SECTOR, sectors)
        )
        image.seek(510)
        image.write(b"\x55\xaa")
    write_boot_partition(
        disk,
        sectors=sectors,
        label=LABEL,
        kernel=kernel,
        initramfs=initramfs,
        arguments=arguments,
        tools=tools,
    )


def write_boot_partition(
    disk: Path,
    *,
    sectors: int,
    label: str,
    kernel: Path,
    initramfs: Path,
    arguments: str,
    tools: Path,
) -> None:
    """Fill the partition of that many sectors at FIRST_SECTOR of a raw disk; see above.

    The master boot record, which must lead to it, is the caller's. Raises ToolFailed.
    """
    offset = FIRST_SECTOR * SECTOR
    partition = f"{disk}@@{offset}"
    # syslinux calls mtools by name.
    environment = os.environ | {
        "PATH": f"{tools / 'usr/bin'}:{os.environ.get('PATH', os.defpath)}",
        "SOURCE_DATE_EPOCH": str(_EPOCH),
        "TZ": "UTC",
    }

    def run(name: str, *arguments: str | Path, stdin: bytes | None = None) -> None:
        argv = [tools / "usr/bin" / name, *arguments]
        run_tool_blocking(argv, timeout_s=60, env=environment, stdin=stdin)

    def copy(source: Path, target: str) -> None:
        os.utime(source, (_EPOCH, _EPOCH))
        run("mcopy", "-m", "-i", partition, source, f"::{target}")

    def write(text: str, target: str) -> None:
        run("mcopy", "-i", partition, "-", f"::{target}", stdin=text.encode())

    # 64 heads and 32 sectors a track: the geometry syslinux reads by where it cannot use LBA.
    geometry = ("-T", str(sectors), "-h", "64", "-s", "32", "-H", str(FIRST_SECTOR))
    run("mformat", "-i", partition, "-v", label, "-N", _SERIAL, *geometry, "::")
    run("mmd", "-i", partition, "::/EFI", "::/EFI/BOOT", "::/loader", "::/loader/entries")
    copy(kernel, "/vmlinuz")
    copy(initramfs, "/initramfs")
    copy(tools / "usr/lib/systemd/boot/efi/systemd-bootx64.efi", "/EFI/BOOT/BOOTX64.EFI")
    write(_LOADER, "/loader/loader.conf")
    write(_ENTRY.format(arguments=arguments), "/loader/entries/lumed.conf")
    write(_SYSLINUX.format(arguments=arguments), "/syslinux.cfg")
    run("syslinux", "--install", "--offset", str(offset), disk)
