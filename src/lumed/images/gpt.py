"""A GUID partition table, for disks that may grow past the 2 TiB of a master boot record.

Layout: UEFI specification, chapter 5. The first partition is marked for SYSLINUX's boot code
(attribute bit 2, "legacy BIOS bootable"), which is written into the protective record.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

EFI_SYSTEM = uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
LINUX_ROOT_AMD64 = uuid.UUID("4f68bce3-e8cd-4db1-96e7-fbcaf984b709")
BIOS_BOOTABLE = 1 << 2

_SECTOR = 512
_ENTRY_COUNT = 128
_TABLE_SECTORS = _ENTRY_COUNT * 128 // _SECTOR
END_SECTORS = 1 + _TABLE_SECTORS  # the copy at the end of the disk


@dataclass(frozen=True, slots=True)
class Partition:
    """One entry; first and last are sectors, and last belongs to it."""

    type: uuid.UUID
    id: uuid.UUID
    first: int
    last: int
    name: str
    attributes: int = 0


def plan_gpt(
    disk_sectors: int, partitions: Sequence[Partition], *, disk_id: uuid.UUID, boot_code: bytes
) -> tuple[bytes, bytes]:
    """What stands in the first 34 sectors of the disk and in the last END_SECTORS."""
    table = b"".join(map(_entry, partitions)).ljust(_ENTRY_COUNT * 128, b"\0")
    last = disk_sectors - 1

    def header(own: int, other: int, table_at: int) -> bytes:
        def pack(checksum: int) -> bytes:
            return struct.pack(
                "<8s4sIIIQQQQ16sQIII",
                b"EFI PART",
                b"\0\0\1\0",
                92,
                checksum,
                0,
                own,
                other,
                2 + _TABLE_SECTORS,
                disk_sectors - END_SECTORS - 1,
                disk_id.bytes_le,
                table_at,
                _ENTRY_COUNT,
                128,
                zlib.crc32(table),
            )

        return pack(zlib.crc32(pack(0))).ljust(_SECTOR, b"\0")

    protective = struct.pack(
        "<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff\xff\xff", 1, min(last, 0xFFFFFFFF)
    )
    record = boot_code.ljust(446, b"\0") + protective.ljust(64, b"\0") + b"\x55\xaa"
    if len(boot_code) > 440:
        raise ValueError(f"boot code of {len(boot_code)} bytes; at most 440 fit")
    front = record + header(1, last, 2) + table
    return front, table + header(last, 1, last - _TABLE_SECTORS)


def _entry(partition: Partition) -> bytes:
    return struct.pack(
        "<16s16sQQQ72s",
        partition.type.bytes_le,
        partition.id.bytes_le,
        partition.first,
        partition.last,
        partition.attributes,
        partition.name.encode("utf-16-le"),
    )
