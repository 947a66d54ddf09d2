"""A disk's map and content through QEMU, and the flat file that is made of them."""

from __future__ import annotations

import os
import random
import struct
import subprocess
from pathlib import Path

import pytest

from lumed.errors import ToolFailed
from lumed.images.diskmap import BLOCK_BYTES, DiskMap, read_map
from lumed.images.flatqcow2 import FlatQcow2
from lumed.images.nbd import open_disk
from lumed.images.qcow2 import HEAD_BYTES, parse_header

GIB = 1 << 30


def run(*argv: str | Path) -> bytes:
    return subprocess.run(argv, check=True, capture_output=True, timeout=60).stdout


def make_disk(path: Path, size: int, *writes: str) -> Path:
    run("qemu-img", "create", "-f", "qcow2", path, str(size))
    commands = [word for command in writes for word in ("-c", command)]
    run("qemu-io", "-f", "qcow2", *commands, path)
    return path


def test_the_map_shows_the_blocks_with_data_of_the_whole_chain(tmp_path: Path) -> None:
    base = make_disk(
        tmp_path / "base", 8 * BLOCK_BYTES, "write 0 64k", "write 3M 1M", "write 5M 4k"
    )
    top = tmp_path / "top"
    run("qemu-img", "create", "-f", "qcow2", "-b", base, "-F", "qcow2", top, str(40 * GIB))
    # Zeros over what the base has, and a write over the border of two blocks, far behind.
    border = 33 * GIB
    zeros, write = "write -z 3M 1M", f"write {border - 4096} 8192"
    run("qemu-io", "-f", "qcow2", "-c", zeros, "-c", write, top)
    found = read_map(top)
    assert found.size_bytes == 40 * GIB
    at = border // BLOCK_BYTES
    assert [n for n, data in enumerate(found.blocks) if data] == [0, 5, at - 1, at]
    assert [(file.path, file.inode) for file in found.files] == [
        (str(path), path.stat().st_ino) for path in (top, base)
    ]


def test_reads_give_the_content_and_leave_no_file(tmp_path: Path) -> None:
    # Deep enough that a socket's path would not fit.
    scratch = tmp_path / ("long" * 30)
    scratch.mkdir()
    disk = make_disk(tmp_path / "disk", 2 * BLOCK_BYTES + 512, "write -P 0x41 1M 64k")
    with open_disk(disk, scratch, 3) as reader:
        assert reader.size_bytes == 2 * BLOCK_BYTES + 512
        assert reader.read(BLOCK_BYTES - 2, 4) == b"\0\0AA"
        assert reader.read(2 * BLOCK_BYTES, 512) == bytes(512)
        assert [path.name for path in scratch.iterdir()] == ["qemu-nbd.log"]
        with pytest.raises(ToolFailed, match="cannot be read at byte"):
            reader.read(2 * BLOCK_BYTES, 1024)


def test_a_disk_that_is_none_is_told_in_the_words_of_qemu(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no disk")
    with (
        pytest.raises(ToolFailed, match="not in qcow2 format"),
        open_disk(tmp_path / "text", tmp_path, 2),
    ):
        pass


# Sizes at which tables begin: one second-level table covers 128 GiB.
@pytest.mark.parametrize("size", [512, BLOCK_BYTES, 128 * GIB, 300 * GIB + 512, 1 << 40])
def test_a_flat_file_is_sound_and_holds_each_block_at_its_place(tmp_path: Path, size: int) -> None:
    blocks = bytearray(-(-size // BLOCK_BYTES))
    chosen = random.Random(size)  # noqa: S311
    for number in {0, len(blocks) - 1, *(chosen.randrange(len(blocks)) for _ in range(6))}:
        blocks[number] = 1

    def read(offset: int, length: int) -> bytes:
        return struct.pack("<Q", offset + 1).ljust(length, b"\xee")

    flat = FlatQcow2(DiskMap(size, (), bytes(blocks)), read)
    path = tmp_path / "flat.qcow2"
    with path.open("wb") as file:
        for piece in flat.pieces():
            assert piece.read is not None
            content = piece.read()
            assert len(content) == piece.length
            if content.count(0) < len(content):
                file.write(content)
            else:
                file.seek(piece.length, os.SEEK_CUR)
        assert file.tell() == flat.size_bytes
    with path.open("rb") as written:
        header = parse_header(written.read(HEAD_BYTES), flat.size_bytes)
    assert header.virtual_size_bytes == size
    run("qemu-img", "check", "-f", "qcow2", path)
    with open_disk(path, tmp_path, 1) as reader:
        for number, has_data in enumerate(blocks):
            if has_data:
                at = number * BLOCK_BYTES
                length = min(BLOCK_BYTES, size - at)
                assert reader.read(at, length) == read(at, length)
    assert read_map(path).blocks == blocks
