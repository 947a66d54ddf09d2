"""Which firmware boots a disk, and where its EFI system partitions are: its first sectors tell.

Layouts: UEFI specification, chapter 5 (MBR and GPT); GRUB manual, "BIOS installation".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from lumed.model.vm import Firmware

FIRST_BYTES = 34 * 512  # the boot sector, the GPT header, 128 GPT entries

_GPT_PROTECTIVE = 0xEE
_MBR_EFI_SYSTEM = 0xEF
_BIOS_BOOT = b"Hah!IdontNeedEFI"  # 21686148-6449-6E6F-744E-656564454649 as it lies on disk
_EFI_SYSTEM = bytes.fromhex("28732ac11ff8d211ba4b00a0c93ec93b")  # C12A7328-F81F-11D2-…
_LEGACY_BOOTABLE = 1 << 2
_MAX_EFI_PARTITIONS = 4
_MAX_SECTORS = 1 << 47  # more than any disk here; keeps offsets within what pread(2) takes


def plan_firmware(first: bytes) -> Firmware:
    """The firmware for a disk whose first FIRST_BYTES (or all) are `first`; UEFI in doubt.

    A disk that both can boot (most cloud images) gets BIOS, which is the quicker one.
    """
    sector = first[:512]
    if sector[510:512] != b"\x55\xaa" or not any(sector[:440]):
        return Firmware.UEFI
    entries = _mbr_entries(sector)
    kinds = [entry[4] for entry in entries]
    if _GPT_PROTECTIVE in kinds:
        return Firmware.BIOS if _is_gpt_for_bios(first) else Firmware.UEFI
    if _is_bare_fat(sector):
        # A file system without partitions: its boot code usually only says "not bootable".
        return Firmware.UEFI
    if _MBR_EFI_SYSTEM in kinds and not any(entry[0] == 0x80 for entry in entries):
        # parted writes boot code into every new MBR; here nothing is active for it to start.
        return Firmware.UEFI
    return Firmware.BIOS


def find_efi_partitions(first: bytes) -> list[int]:
    """Where EFI system partitions begin, in bytes from the disk's start; 0 for a bare FAT."""
    sector = first[:512]
    if sector[510:512] != b"\x55\xaa":
        return []
    entries = _mbr_entries(sector)
    if any(entry[4] == _GPT_PROTECTIVE for entry in entries):
        starts = [
            struct.unpack_from("<Q", entry, 32)[0]
            for entry in _gpt_entries(first)
            if entry.startswith(_EFI_SYSTEM)
        ]
    elif _is_bare_fat(sector):
        return [0]
    else:
        starts = [
            struct.unpack_from("<I", entry, 8)[0]
            for entry in entries
            if entry[4] == _MBR_EFI_SYSTEM
        ]
    return [start * 512 for start in starts[:_MAX_EFI_PARTITIONS] if 0 < start < _MAX_SECTORS]


def _mbr_entries(sector: bytes) -> list[bytes]:
    return [sector[at : at + 16] for at in range(446, 510, 16)]


def _is_bare_fat(sector: bytes) -> bool:
    return b"FAT" in (sector[54:57], sector[82:85])


def _is_gpt_for_bios(first: bytes) -> bool:
    for entry in _gpt_entries(first):
        (attributes,) = struct.unpack_from("<Q", entry, 48)
        if entry.startswith(_BIOS_BOOT) or attributes & _LEGACY_BOOTABLE:
            return True
    return False


def _gpt_entries(first: bytes) -> Iterator[bytes]:
    header = first[512:1024]
    if not header.startswith(b"EFI PART") or len(header) < 512:
        return
    table_sector, count, entry_bytes = struct.unpack_from("<QII", header, 72)
    for index in range(min(count, 128)):
        start = table_sector * 512 + index * entry_bytes
        entry = first[start : start + 128]
        if len(entry) < 128:
            return
        yield entry
