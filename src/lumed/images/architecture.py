"""Whose processor a disk is for, told by the boot loader on its EFI system partition.

Lume's formats do not say it. The loader's name for disks that nobody has installed yet is fixed:
UEFI specification, 3.5.1.1, "Removable Media Boot Behavior". Only a few small ranges are read.
"""

from __future__ import annotations

import os
from pathlib import Path

from lumed.errors import ToolFailed
from lumed.images.boot import FIRST_BYTES, find_efi_partitions
from lumed.images.fat import Read, list_directory
from lumed.images.inspect import find_format, read_qcow2
from lumed.images.qcow2 import UnfitImage
from lumed.model.vm import Architecture, DiskFormat

_FOLDER = (b"EFI        ", b"BOOT       ")
# amd64 first: a disk that boots on both is better not emulated.
_LOADERS = ((b"BOOTX64 EFI", Architecture.AMD64), (b"BOOTAA64EFI", Architecture.ARM64))

# One block has the partition table and, mostly, the beginning of the EFI system partition.
_BLOCK_BYTES = 2 << 20
_MAX_BLOCKS = 12


def find_architecture_of(path: Path, disk_format: DiskFormat) -> Architecture | None:
    """The architecture of a disk that was inspected (inspect.py); None if it does not tell.

    Blocks: for a raw disk below 1 ms, for a qcow2 one some 10 ms for each of its blocks that is
    needed, mostly one or two.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if disk_format is DiskFormat.RAW:
            return find_architecture(lambda offset, length: os.pread(fd, length, offset))
        _, virtual_bytes = find_format(fd, path)
        return find_architecture(_qcow2_reader(path.absolute(), virtual_bytes))
    except (UnfitImage, ToolFailed):
        return None
    finally:
        os.close(fd)


def find_architecture(read: Read) -> Architecture | None:
    """The architecture of the disk that `read` reads; None if it does not tell."""
    for start in find_efi_partitions(read(0, FIRST_BYTES)):
        names = list_directory(read, start, _FOLDER)
        for loader, architecture in _LOADERS:
            if loader in names:
                return architecture
    return None


def _qcow2_reader(path: Path, virtual_bytes: int) -> Read:
    blocks: dict[int, bytes] = {}

    def read_block(index: int) -> bytes:
        if index not in blocks:
            start = index * _BLOCK_BYTES
            # A disk made to send us all over the place ends here, too.
            if start >= virtual_bytes or len(blocks) == _MAX_BLOCKS:
                return b""
            blocks[index] = read_qcow2(path, start, min(_BLOCK_BYTES, virtual_bytes - start))
        return blocks[index]

    def read(offset: int, length: int) -> bytes:
        parts = b""
        while len(parts) < length:
            index, skipped = divmod(offset + len(parts), _BLOCK_BYTES)
            part = read_block(index)[skipped : skipped + length - len(parts)]
            if not part:
                break
            parts += part
        return parts

    return read
