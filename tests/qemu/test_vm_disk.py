"""Disks of VMs, made by the real qemu-img and judged by it."""

import asyncio
import json
import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lumed.errors import AlreadyExists, InvalidField, NoSpace, ToolFailed, WrongState
from lumed.model.vm import DiskFormat
from lumed.store.disk import DiskUsage, create_empty, create_overlay, grow, read_usage

MIB = 1 << 20
GIB = 1 << 30


def tool(*arguments: str | Path, stdin: str | None = None) -> str:
    done = subprocess.run(
        arguments, check=True, timeout=30, input=stdin, capture_output=True, text=True
    )
    return done.stdout


def info(path: Path) -> dict[str, object]:
    """What QEMU itself reads in a disk; fails if the disk is not consistent."""
    tool("qemu-img", "check", "-q", "-f", "qcow2", path)
    answer: dict[str, object] = json.loads(
        tool("qemu-img", "info", "-f", "qcow2", "--output=json", path)
    )
    return answer


@contextmanager
def held_open(path: Path) -> Iterator[None]:
    """The disk is open for writing in a QEMU process."""
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write("length\n")
            process.stdin.flush()
            assert process.stdout.readline()  # it answers, so the disk is open
            yield
        finally:
            process.kill()


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    path = tmp_path / "full"
    path.mkdir()
    tool("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", path)
    try:
        yield path
    finally:
        # Lazily: a failed test can hold a file open, and the mount would stay.
        tool("umount", "-l", path)


@pytest.mark.parametrize("size", [512, 64 * MIB, 400 * GIB, 8 << 40, 64 << 40])
async def test_an_empty_disk_has_its_size_and_nothing_else(tmp_path: Path, size: int) -> None:
    path = tmp_path / "disk.qcow2"
    await create_empty(path, size)
    facts = info(path)
    assert facts["virtual-size"] == size
    assert "backing-filename" not in facts
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["disk.qcow2"]


@pytest.mark.parametrize("size", [4 * MIB, 400 * GIB, 8 << 40])
async def test_an_overlay_names_its_image_and_its_format(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a,b: ü.raw").write_bytes(b"hello".ljust(4 * MIB, b"\0"))
    monkeypatch.chdir(tmp_path)
    await create_overlay(Path("disk.qcow2"), Path("a,b: ü.raw"), DiskFormat.RAW, size)
    facts = info(tmp_path / "disk.qcow2")
    assert facts["virtual-size"] == size
    assert facts["backing-filename"] == str(tmp_path / "a,b: ü.raw")
    assert facts["backing-filename-format"] == "raw"
    shown = tool("qemu-io", "-r", "-f", "qcow2", "-c", "read -v 0 512", tmp_path / "disk.qcow2")
    assert "hello" in shown


async def test_a_first_small_write_copies_no_more_than_a_page_of_the_image(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(os.urandom(4 * MIB))
    path = tmp_path / "disk.qcow2"
    await create_overlay(path, tmp_path / "image", DiskFormat.RAW, 4 * MIB)
    writes = [part for at in range(0, 32, 4) for part in ("-c", f"write {at * 64}k 4k")]
    before = read_usage(path).allocated_bytes
    tool("qemu-io", "-f", "qcow2", *writes, path)
    # The first table and eight pages; with QEMU's default it would be eight times 64 KiB.
    assert read_usage(path).allocated_bytes - before <= (128 + 64 + 8 * 4) << 10


async def test_an_overlay_smaller_than_its_image_is_refused(tmp_path: Path) -> None:
    await create_empty(tmp_path / "image", 64 * MIB)
    with pytest.raises(InvalidField, match="smaller than the image"):
        await create_overlay(
            tmp_path / "disk", tmp_path / "image", DiskFormat.QCOW2, 64 * MIB - 512
        )
    assert [p.name for p in tmp_path.iterdir()] == ["image"]


@pytest.mark.parametrize("size", [0, -512, 511, 4 * MIB + 1])
async def test_impossible_sizes_are_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(InvalidField) as caught:
        await create_empty(tmp_path / "disk", size)
    assert "diskSize" in caught.value.fields
    assert not list(tmp_path.iterdir())


async def test_a_disk_that_exists_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_text("precious")
    with pytest.raises(AlreadyExists):
        await create_empty(path, MIB)
    assert path.read_text() == "precious"


async def test_a_leftover_of_a_killed_create_does_not_stand_in_the_way(tmp_path: Path) -> None:
    (tmp_path / ".disk.new").write_bytes(b"half")
    await create_empty(tmp_path / "disk", MIB)
    assert [p.name for p in tmp_path.iterdir()] == ["disk"]


async def test_a_create_without_space_says_so_and_leaves_nothing(full_disk: Path) -> None:
    (full_disk / "filler").write_bytes(b"x" * (60 << 10))
    with pytest.raises(NoSpace, match="Not enough space") as caught:
        await create_empty(full_disk / "disk", GIB)
    assert str(full_disk) in caught.value.message
    assert [p.name for p in full_disk.iterdir()] == ["filler"]


async def test_a_disk_grows(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    await create_empty(path, 64 * MIB)
    await grow(path, DiskFormat.QCOW2, GIB)
    assert info(path)["virtual-size"] == GIB
    (tmp_path / "raw").write_bytes(b"x" * 1024)
    await grow(tmp_path / "raw", DiskFormat.RAW, MIB)
    assert (tmp_path / "raw").stat().st_size == MIB


async def test_an_overlay_grows_and_keeps_its_data(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"hello".ljust(MIB, b"\0"))
    path = tmp_path / "disk"
    await create_overlay(path, tmp_path / "image", DiskFormat.RAW, MIB)
    tool("qemu-io", "-f", "qcow2", "-c", "write -P 65 512k 4k", path)
    await grow(path, DiskFormat.QCOW2, 2 * GIB)
    assert info(path)["virtual-size"] == 2 * GIB
    reads = ["-c", "read -P 65 512k 4k", "-c", "read -P 0 1M 4k"]
    assert "verification failed" not in tool("qemu-io", "-f", "qcow2", *reads, path)


async def test_a_disk_never_shrinks(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    await create_empty(path, 64 * MIB)
    with pytest.raises(InvalidField, match="never shrinks"):
        await grow(path, DiskFormat.QCOW2, 32 * MIB)
    await grow(path, DiskFormat.QCOW2, 64 * MIB)
    assert info(path)["virtual-size"] == 64 * MIB


async def test_a_disk_in_use_does_not_grow(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    await create_empty(path, 64 * MIB)
    with held_open(path):
        with pytest.raises(WrongState, match="in use by a running machine"):
            await grow(path, DiskFormat.QCOW2, GIB)
        assert read_usage(path).virtual_bytes == 64 * MIB
    await grow(path, DiskFormat.QCOW2, GIB)


async def test_a_disk_may_be_larger_than_what_is_free(full_disk: Path) -> None:
    path = full_disk / "disk"
    path.write_bytes(b"x" * 4096)
    await grow(path, DiskFormat.RAW, 2 * GIB)
    assert path.stat().st_size == 2 * GIB
    assert path.stat().st_blocks * 512 < 64 * 1024


async def test_usage_takes_the_format_as_named_and_never_from_the_content(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    await create_empty(path, GIB)
    size = path.stat()
    assert read_usage(path) == DiskUsage(size.st_blocks * 512, GIB)
    padded = -(-size.st_size // 512) * 512
    assert read_usage(path, DiskFormat.RAW) == DiskUsage(size.st_blocks * 512, padded)


async def test_usage_of_a_disk_that_lost_its_header_fails(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(MIB))
    with pytest.raises(ToolFailed, match="header is gone"):
        read_usage(tmp_path / "disk")


async def test_a_cancelled_create_ends_before_its_cancellation(tmp_path: Path) -> None:
    task = asyncio.create_task(create_empty(tmp_path / "disk", GIB))
    await asyncio.sleep(0)  # it has begun
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # The thread was waited for, so the disk is complete and nothing is half made.
    assert [p.name for p in tmp_path.iterdir()] == ["disk"]
    assert info(tmp_path / "disk")["virtual-size"] == GIB
