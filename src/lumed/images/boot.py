"""Which firmware boots a disk, read from its first sectors.

Layouts: UEFI specification, chapter 5 (MBR and GPT); GRUB manual, "BIOS installation".
"""

from __future__ import annotations

import struct

from lumed.model.vm import Firmware

FIRST_BYTES = 34 * 512  # the boot sector, the GPT header, 128 GPT entries

_GPT_PROTECTIVE = 0xEE
_MBR_EFI_SYSTEM = 0xEF
_BIOS_BOOT = b"Hah!IdontNeedEFI"  # 21686148-6449-6E6F-744E-656564454649 as it lies on disk
_LEGACY_BOOTABLE = 1 << 2


def plan_firmware(first: bytes) -> Firmware:
    """The firmware for a disk whose first FIRST_BYTES (or all) are `first`; UEFI in doubt.

    A disk that both can boot (most cloud images) gets BIOS, which is the quicker one.
    """
    sector = first[:512]
    if sector[510:512] != b"\x55\xaa" or not any(sector[:440]):
        return Firmware.UEFI
    entries = [sector[at : at + 16] for at in range(446, 510, 16)]
    kinds = [entry[4] for entry in entries]
    if _GPT_PROTECTIVE in kinds:
        return Firmware.BIOS if _is_gpt_for_bios(first) else Firmware.UEFI
    if b"FAT" in (sector[54:57], sector[82:85]):
        # A file system without partitions: its boot code usually only says "not bootable".
        return Firmware.UEFI
    if _MBR_EFI_SYSTEM in kinds and not any(entry[0] == 0x80 for entry in entries):
        # parted writes boot code into every new MBR; here nothing is active for it to start.
        return Firmware.UEFI
    return Firmware.BIOS


def _is_gpt_for_bios(first: bytes) -> bool:
    header = first[512:1024]
    if not header.startswith(b"EFI PART") or len(header) < 512:
        return False
    table_sector, count, entry_bytes = struct.unpack_from("<QII", header, 72)
    for index in range(min(count, 128)):
        start = table_sector * 512 + index * entry_bytes
        entry = first[start : start + 128]
        if len(entry) < 128:
            return False
        (attributes,) = struct.unpack_from("<Q", entry, 48)
        if entry.startswith(_BIOS_BOOT) or attributes & _LEGACY_BOOTABLE:
            return True
    return False
