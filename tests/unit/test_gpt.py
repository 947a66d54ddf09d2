"""The partition table, as the kernel's rules check it."""

from __future__ import annotations

import struct
import uuid
import zlib

import pytest

from lumed.images.boot import FIRST_BYTES, plan_firmware
from lumed.images.gpt import (
    BIOS_BOOTABLE,
    EFI_SYSTEM,
    END_SECTORS,
    LINUX_ROOT_AMD64,
    Partition,
    plan_gpt,
)
from lumed.model.vm import Firmware

SECTORS = 1 << 16


def table(attributes: int = BIOS_BOOTABLE) -> tuple[bytes, bytes]:
    boot = Partition(EFI_SYSTEM, uuid.uuid4(), 2048, 4095, "boot", attributes)
    root = Partition(LINUX_ROOT_AMD64, uuid.uuid4(), 4096, 8191, "root")
    return plan_gpt(SECTORS, [boot, root], disk_id=uuid.uuid4(), boot_code=b"\x33\xc0")


def test_both_headers_hold_their_sums_and_name_each_other() -> None:
    front, end = table()
    assert len(front) == 34 * 512
    assert len(end) == END_SECTORS * 512
    for header, entries, own, other in (
        (front[512:1024], front[1024:], 1, SECTORS - 1),
        (end[-512:], end[:-512], SECTORS - 1, 1),
    ):
        told = struct.unpack_from("<8s4sIIIQQQQ16sQIII", header)
        assert told[0] == b"EFI PART"
        assert told[3] == zlib.crc32(header[:16] + bytes(4) + header[20:92])
        assert told[5:7] == (own, other)
        assert told[7:9] == (34, SECTORS - END_SECTORS - 1)
        assert told[10] == (2 if own == 1 else SECTORS - END_SECTORS)
        assert told[13] == zlib.crc32(entries)
    assert front[1024:] == end[:-512]


def test_a_marked_partition_makes_the_disk_one_for_bios() -> None:
    assert plan_firmware(table()[0][:FIRST_BYTES]) is Firmware.BIOS
    assert plan_firmware(table(0)[0][:FIRST_BYTES]) is Firmware.UEFI


def test_boot_code_that_would_reach_into_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="boot code"):
        plan_gpt(SECTORS, [], disk_id=uuid.uuid4(), boot_code=bytes(447))
