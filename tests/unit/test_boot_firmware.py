"""Which firmware boots a disk, from its first sectors."""

import struct

from hypothesis import given
from hypothesis import strategies as st

from lumed.images.boot import FIRST_BYTES, plan_firmware
from lumed.model.vm import Firmware

CODE = b"\xfa\xeb\x63\x90"
BIOS_BOOT = bytes.fromhex("48616821 49646F6E 744E6565 64454649")
EFI_SYSTEM = bytes.fromhex("28732ac1 1ff8d211 ba4b00a0 c93ec93b")


def mbr(
    code: bytes = b"", *kinds: int, active: bool = False, oem: bytes = b"", at: int = 3
) -> bytes:
    sector = bytearray(512)
    sector[: len(code)] = code
    sector[at : at + len(oem)] = oem
    for index, kind in enumerate(kinds):
        entry = bytes([0x80 if active and index == 0 else 0, 0, 0, 0, kind]) + bytes(11)
        sector[446 + 16 * index : 462 + 16 * index] = entry
    sector[510:] = b"\x55\xaa"
    return bytes(sector)


def gpt(code: bytes, *partitions: bytes, attributes: int = 0) -> bytes:
    header = bytearray(512)
    header[:8] = b"EFI PART"
    struct.pack_into("<QII", header, 72, 2, 128, 128)
    table = b"".join(kind + bytes(32) + struct.pack("<Q", attributes) for kind in partitions)
    spaced = b"".join(table[at : at + 56].ljust(128, b"\0") for at in range(0, len(table), 56))
    return (mbr(code, 0xEE) + bytes(header) + spaced).ljust(FIRST_BYTES, b"\0")


def test_an_empty_disk_boots_by_uefi() -> None:
    assert plan_firmware(bytes(FIRST_BYTES)) is Firmware.UEFI
    assert plan_firmware(b"") is Firmware.UEFI


def test_an_mbr_disk_with_boot_code_boots_by_bios() -> None:
    assert plan_firmware(mbr(CODE, 0x83, active=True)) is Firmware.BIOS
    assert plan_firmware(mbr(CODE, 0x83)) is Firmware.BIOS


def test_an_mbr_disk_without_boot_code_boots_by_uefi() -> None:
    assert plan_firmware(mbr(b"", 0x83, active=True)) is Firmware.UEFI


def test_an_mbr_disk_with_only_an_efi_partition_boots_by_uefi_despite_stub_code() -> None:
    assert plan_firmware(mbr(CODE, 0xEF)) is Firmware.UEFI
    assert plan_firmware(mbr(CODE, 0x83, 0xEF, active=True)) is Firmware.BIOS


def test_a_bare_fat_file_system_boots_by_uefi() -> None:
    assert plan_firmware(mbr(b"\xeb\x58\x90", oem=b"FAT32", at=82)) is Firmware.UEFI
    assert plan_firmware(mbr(b"\xeb\x3c\x90", oem=b"FAT16", at=54)) is Firmware.UEFI


def test_a_gpt_disk_with_a_bios_boot_partition_and_code_boots_by_bios() -> None:
    assert plan_firmware(gpt(CODE, EFI_SYSTEM, BIOS_BOOT)) is Firmware.BIOS
    assert plan_firmware(gpt(b"", EFI_SYSTEM, BIOS_BOOT)) is Firmware.UEFI


def test_a_gpt_disk_marked_legacy_bootable_boots_by_bios() -> None:
    assert plan_firmware(gpt(CODE, EFI_SYSTEM, attributes=4)) is Firmware.BIOS


def test_a_gpt_disk_without_a_bios_boot_partition_boots_by_uefi() -> None:
    assert plan_firmware(gpt(CODE, EFI_SYSTEM)) is Firmware.UEFI


@given(st.binary(max_size=2048), st.integers(0, 2048), st.binary(max_size=64))
def test_any_bytes_have_an_answer(noise: bytes, at: int, patch: bytes) -> None:
    base = bytearray(gpt(CODE, EFI_SYSTEM))
    base[at : at + len(patch)] = patch
    assert plan_firmware(bytes(base)) in Firmware
    assert plan_firmware(noise) in Firmware
