"""Where EFI system partitions lie, and FAT that does not fit: any bytes have an answer."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from lumed.images.architecture import find_architecture
from lumed.images.boot import find_efi_partitions
from lumed.images.fat import list_directory
from lumed.model.vm import Architecture
from tests.unit.test_boot_firmware import CODE, EFI_SYSTEM, gpt, mbr


def entry(kind: int, start: int) -> bytes:
    return struct.pack("<B3sB3sII", 0, b"", kind, b"", start, 2048)


def make_fat12(name: bytes) -> bytearray:
    """EFI/BOOT/<name> in a file system of one reserved sector, one FAT and 16 root entries."""
    boot = bytearray(512)
    struct.pack_into("<HBHBHHBH", boot, 11, 512, 1, 1, 1, 16, 64, 0xF8, 1)
    boot[54:59] = b"FAT12"
    boot[510:] = b"\x55\xaa"
    table = b"\xf8\xff\xff\xff\xff\xff".ljust(512, b"\0")

    def directory(name: bytes, attributes: int, cluster: int) -> bytes:
        record = bytearray(name.ljust(32, b"\0"))
        record[11] = attributes
        struct.pack_into("<H", record, 26, cluster)
        return bytes(record).ljust(512, b"\0")

    efi = directory(b"EFI        ", 0x10, 2)
    folder = directory(b"BOOT       ", 0x10, 3)
    disk = bytes(boot) + table + efi + folder + directory(name, 0x20, 0)
    return bytearray(disk.ljust(64 * 512, b"\0"))


def reader(disk: bytes | bytearray):  # type: ignore[no-untyped-def]
    return lambda offset, length: bytes(disk[offset : offset + length])


def test_the_partition_table_tells_where_they_begin() -> None:
    disk = bytearray(gpt(CODE, bytes(range(16)), EFI_SYSTEM))
    struct.pack_into("<Q", disk, 1024 + 128 + 32, 2048)
    assert find_efi_partitions(bytes(disk)) == [2048 * 512]
    sector = bytearray(mbr(CODE))
    sector[446:478] = entry(0x83, 2048) + entry(0xEF, 8192)
    assert find_efi_partitions(bytes(sector)) == [8192 * 512]
    assert find_efi_partitions(mbr(b"\xeb\x58\x90", oem=b"FAT32", at=82)) == [0]
    assert find_efi_partitions(bytes(512)) == []


def test_a_partition_beyond_any_disk_is_passed_over() -> None:
    disk = bytearray(gpt(CODE, EFI_SYSTEM))
    struct.pack_into("<Q", disk, 1024 + 32, (1 << 64) - 1)
    assert find_efi_partitions(bytes(disk)) == []


def test_a_folder_of_that_name_or_a_file_that_was_deleted_counts_for_nothing() -> None:
    disk = make_fat12(b"BOOTAA64EFI")
    assert find_architecture(reader(disk)) is Architecture.ARM64
    path = (b"EFI        ", b"BOOT       ")
    assert list_directory(reader(disk), 0, path) == {b"BOOTAA64EFI"}
    deleted = make_fat12(b"\xe5OOTAA64EFI")
    assert list_directory(reader(deleted), 0, path) == frozenset()
    disk[1024 + 11] = 0x20  # EFI is a file now
    assert find_architecture(reader(disk)) is None


@given(st.integers(0, 2600), st.binary(max_size=48), st.binary(max_size=700))
def test_any_bytes_have_an_answer(at: int, patch: bytes, noise: bytes) -> None:
    disk = make_fat12(b"BOOTX64 EFI")
    disk[at : at + len(patch)] = patch
    assert find_architecture(reader(disk)) in (None, *Architecture)
    assert find_architecture(reader(noise)) in (None, *Architecture)
