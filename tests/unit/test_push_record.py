"""What is kept of a push, and what is not taken for it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from lumed.images.diskmap import BLOCK_BYTES, DiskFile, DiskMap
from lumed.images.manifests import PushedSlice
from lumed.images.pushrecord import PushRecord

FILE = DiskFile("/vms/web/disk.qcow2", inode=7, size_bytes=1000, mtime_ns=5)
DISK = DiskMap(3 * BLOCK_BYTES, (FILE,), b"\1\0\1")
PART = PushedSlice(BLOCK_BYTES, BLOCK_BYTES, f"sha256:{'a' * 64}", 99, f"sha256:{'b' * 64}")


def test_a_part_is_found_by_a_later_push_of_the_same_disk(tmp_path: Path) -> None:
    record = PushRecord(tmp_path / "new/records", DISK, "lume")
    assert record.find(PART.offset) is None
    record.add(PART)
    assert PushRecord(tmp_path / "new/records", DISK, "lume").find(PART.offset) == PART


@pytest.mark.parametrize(
    "other",
    [
        replace(DISK, size_bytes=2 * BLOCK_BYTES),
        replace(DISK, files=(replace(FILE, mtime_ns=6),)),
        replace(DISK, files=(replace(FILE, inode=8),)),
        replace(DISK, files=(replace(FILE, size_bytes=1001),)),
        replace(DISK, files=(FILE, FILE)),
    ],
)
def test_another_disk_has_another_record(tmp_path: Path, other: DiskMap) -> None:
    PushRecord(tmp_path, DISK, "lume").add(PART)
    assert PushRecord(tmp_path, other, "lume").find(PART.offset) is None
    assert PushRecord(tmp_path, DISK, "container-disk").find(PART.offset) is None


@pytest.mark.parametrize(
    "torn",
    [
        b'\n{"offset": 0, "length',
        b"\n[1]\n\xff\n3\n",
        b'\n{"offset": 0, "length": 1, "digest": "x", "size_bytes": 1, "content_digest": "x"}\n',
        b'\n{"offset": 0, "length": 1, "digest": 5, "size_bytes": 1, "content_digest": 5}\n',
    ],
)
def test_a_torn_or_foreign_line_is_not_read_and_hides_no_other(tmp_path: Path, torn: bytes) -> None:
    PushRecord(tmp_path, DISK, "lume").add(PART)
    [path] = tmp_path.iterdir()
    with path.open("ab") as file:
        file.write(torn)
    record = PushRecord(tmp_path, DISK, "lume")
    assert record.find(0) is None
    record.add(replace(PART, offset=0))
    read = PushRecord(tmp_path, DISK, "lume")
    assert read.find(PART.offset) == PART
    assert read.find(0) == replace(PART, offset=0)


def test_the_records_that_were_not_used_for_longest_go(tmp_path: Path) -> None:
    for number in range(70):
        old = tmp_path / f"{number:032}.jsonl"
        old.touch()
        os.utime(old, (number, number))
    PushRecord(tmp_path, DISK, "lume")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 64
    assert f"{6:032}.jsonl" not in left
    assert f"{69:032}.jsonl" in left


def test_data_is_counted_by_blocks_and_the_last_one_by_its_bytes() -> None:
    disk = DiskMap(2 * BLOCK_BYTES + 10, (FILE,), b"\1\0\1")
    assert disk.count_data(0, 2 * BLOCK_BYTES) == BLOCK_BYTES
    assert disk.count_data(BLOCK_BYTES, BLOCK_BYTES + 10) == 10
    assert disk.count_data(0, 2 * BLOCK_BYTES + 10) == BLOCK_BYTES + 10
