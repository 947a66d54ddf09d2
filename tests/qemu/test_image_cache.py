"""The cache of images, on real files and real images."""

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lumed.claim import take_lock
from lumed.errors import InvalidField, NoSpace, NotFound, WrongState
from lumed.images import copy as copy_module
from lumed.images import local as local_module
from lumed.images.local import BuiltImage, Builtin, ImageCache
from lumed.model.vm import DiskFormat, Firmware
from lumed.store.disk import create_overlay

MIB = 1 << 20


def quiet(stage: str, done: int, total: int) -> None:
    pass


def qemu_img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *arguments], check=True, timeout=30, capture_output=True)


def names(directory: Path) -> list[str]:
    """Everything in the cache that is no empty staging place."""
    return sorted(
        str(p.relative_to(directory)) for p in directory.glob("**/*") if p.name != ".staging"
    )


@pytest.fixture
def cache(tmp_path: Path) -> ImageCache:
    return ImageCache(tmp_path / "cache", {})


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw disk of 64 MiB with 1 MiB of data in the middle of a hole."""
    path = tmp_path / "image.raw"
    with path.open("wb") as file:
        file.truncate(64 * MIB)
        file.seek(32 * MIB)
        file.write(b"data" * (MIB // 4))
    return path


async def test_an_imported_file_is_a_complete_read_only_copy_with_its_holes(
    cache: ImageCache, image: Path, tmp_path: Path
) -> None:
    seen: list[tuple[str, int, int]] = []
    found = await cache.import_file(image, lambda *report: seen.append(report))
    assert found.disk.read_bytes() == image.read_bytes()
    assert found.disk.stat().st_mode & 0o777 == 0o444
    assert found.disk.stat().st_blocks * 512 <= 2 * MIB
    assert (found.name, found.facts.format) == (str(image), DiskFormat.RAW)
    assert (found.facts.virtual_size_bytes, found.facts.firmware) == (64 * MIB, Firmware.UEFI)
    assert found.disk.parent.parent == tmp_path / "cache"
    assert seen[-1] == ("copying", MIB, MIB)
    assert names(tmp_path / "cache") == sorted(
        [found.id, f"{found.id}/disk.raw", f"{found.id}/image.json"]
    )


async def test_the_second_use_finds_the_image_at_once(cache: ImageCache, image: Path) -> None:
    first = await cache.import_file(image, quiet)
    inode = first.disk.stat().st_ino
    link = image.with_name("link.raw")
    link.symlink_to(image)
    assert await cache.import_file(link, quiet) == first
    assert first.disk.stat().st_ino == inode
    assert cache.find(first.id) == first


async def test_vms_keep_their_image_when_the_original_is_changed_or_deleted(
    cache: ImageCache, image: Path, tmp_path: Path
) -> None:
    first = await cache.import_file(image, quiet)
    disk = tmp_path / "vm.qcow2"
    await create_overlay(disk, first.disk, first.facts.format, 64 * MIB)
    with image.open("r+b") as file:
        file.write(b"changed")
    second = await cache.import_file(image, quiet)
    assert second.id != first.id
    assert second.disk.read_bytes()[:7] == b"changed"
    image.unlink()
    assert first.disk.read_bytes()[:7] == bytes(7)
    check_content(disk)


def check_content(disk: Path) -> None:
    reads = ["-c", "read -P 100 32M 1", "-c", "read -P 0 0 1M"]
    argv = ["qemu-io", "-f", "qcow2", *reads, str(disk)]
    done = subprocess.run(argv, check=True, timeout=30, capture_output=True)
    assert b"Pattern verification failed" not in done.stdout


async def test_two_imports_of_one_file_copy_once(
    cache: ImageCache, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[Path] = []
    real = copy_module.copy_image

    def counting(source: int, target: Path, **options: object) -> None:
        copies.append(target)
        real(source, target, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("lumed.images.local.copy_image", counting)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(cache.import_file(image, quiet)) for _ in range(5)]
    assert len({task.result().id for task in tasks}) == 1
    assert len(copies) == 1


async def test_two_servers_that_import_one_file_agree(image: Path, tmp_path: Path) -> None:
    caches = [ImageCache(tmp_path / "cache", {}) for _ in range(4)]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(cache.import_file(image, quiet)) for cache in caches]
    found = {task.result().disk for task in tasks}
    assert len(found) == 1
    assert len(names(tmp_path / "cache")) == 3


async def test_an_unfit_file_is_refused_by_its_own_name_and_leaves_nothing(
    cache: ImageCache, image: Path, tmp_path: Path
) -> None:
    overlay = tmp_path / "overlay.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", image, "-F", "raw", overlay)
    hidden = tmp_path / "hidden.raw"
    qemu_img("create", "-f", "qcow2", hidden, "1M")
    cut = tmp_path / "cut.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", image, cut)
    os.truncate(cut, cut.stat().st_size - MIB // 2)
    for path, reason in (
        (overlay, "backing file"),
        (hidden, "begins with a qcow2 header"),
        (cut, "does not pass the check"),
        (tmp_path / "missing", "does not exist"),
        (tmp_path, "directory"),
    ):
        with pytest.raises(InvalidField, match=reason) as caught:
            await cache.import_file(path, quiet)
        assert str(path) in caught.value.message
        assert "cache" not in caught.value.message
    assert names(tmp_path / "cache") == []


async def test_a_cancelled_import_ends_with_its_next_step_and_leaves_nothing(
    cache: ImageCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "big.img"
    path.write_bytes(b"x" * (64 * MIB))
    copying = asyncio.Event()
    go_on = threading.Event()
    real = os.sendfile
    steps: list[int] = []

    def waiting_from_the_second_step_on(out: int, source: int, at: int, count: int) -> int:
        if steps:
            assert go_on.wait(10)
        steps.append(at)
        return real(out, source, at, count)

    monkeypatch.setattr(os, "sendfile", waiting_from_the_second_step_on)
    task = asyncio.create_task(cache.import_file(path, lambda *_: copying.set()))
    await asyncio.wait_for(copying.wait(), 10)
    task.cancel()
    await asyncio.sleep(0)  # the cancellation has arrived
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    # The stop was seen before the second of four steps, or during it.
    assert steps in ([0], [0, 16 * MIB])
    assert names(tmp_path / "cache") == []
    assert (await cache.import_file(path, quiet)).disk.stat().st_size == 64 * MIB


async def test_a_file_that_changes_while_it_is_copied_is_refused(
    cache: ImageCache, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.sendfile

    def writing_meanwhile(*arguments: int) -> int:
        with image.open("ab") as file:
            file.write(b"x")
        return real(*arguments)

    monkeypatch.setattr(os, "sendfile", writing_meanwhile)
    with pytest.raises(InvalidField, match="changed while it was copied"):
        await cache.import_file(image, quiet)
    assert names(tmp_path / "cache") == []


async def test_new_content_is_never_stored_under_the_id_of_the_old(
    cache: ImageCache, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = local_module._identify_file

    def changed_right_after(path: Path) -> tuple[Path, str]:
        identified = real(path)
        os.truncate(image, 65 * MIB)
        return identified

    monkeypatch.setattr(local_module, "_identify_file", changed_right_after)
    with pytest.raises(InvalidField, match="changed just now"):
        await cache.import_file(image, quiet)
    assert names(tmp_path / "cache") == []


async def test_the_disk_of_a_running_machine_is_not_copied(
    cache: ImageCache, tmp_path: Path
) -> None:
    path = tmp_path / "running.qcow2"
    qemu_img("create", "-f", "qcow2", path, "64M")
    process = await asyncio.to_thread(open_in_qemu, path)
    try:
        with pytest.raises(WrongState, match="disk of a running machine"):
            await cache.import_file(path, quiet)
        assert names(tmp_path / "cache") == []
    finally:
        process.kill()
        process.communicate()
    await cache.import_file(path, quiet)


def open_in_qemu(path: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"length\n")
    process.stdin.flush()
    assert process.stdout.readline()  # it answers, so the disk is open
    return process


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        # Lazily: a failed test can hold a file open, and the mount would stay.
        subprocess.run(["umount", "-l", path], check=True)


async def test_a_full_disk_is_found_before_the_copy_and_during_it(
    small_disk: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ImageCache(small_disk / "cache", {})
    big = image.with_name("big.raw")
    big.write_bytes(b"x" * 8 * MIB)
    with pytest.raises(NoSpace, match=r"needs 8\.0 MB, has"):
        await cache.import_file(big, quiet)
    monkeypatch.setattr("lumed.images.copy.check_free_space", lambda *_: None)
    with pytest.raises(NoSpace, match=r"to import big\.raw"):
        await cache.import_file(big, quiet)
    assert names(small_disk / "cache") == []
    assert (await cache.import_file(image, quiet)).disk.stat().st_size == 64 * MIB


@pytest.mark.parametrize("damage", ["meta gone", "meta cut", "disk gone", "disk cut", "empty"])
async def test_a_damaged_image_is_ignored_imported_anew_and_never_deleted(
    cache: ImageCache, image: Path, damage: str
) -> None:
    first = await cache.import_file(image, quiet)
    meta = first.disk.with_name("image.json")
    if damage in ("meta gone", "empty"):
        meta.unlink()
    if damage in ("disk gone", "empty"):
        first.disk.unlink()
    if damage == "meta cut":
        meta.write_bytes(meta.read_bytes()[:-20])
    if damage == "disk cut":
        os.truncate(first.disk, 512)
    left = names(first.disk.parent)
    assert cache.find(first.id) is None
    second = await cache.import_file(image, quiet)
    assert second.disk.read_bytes() == image.read_bytes()
    if damage != "empty":
        assert second.id == f"{first.id}-2"
        assert names(first.disk.parent) == left
    assert await cache.import_file(image, quiet) == second
    assert cache.find(second.id) == second


def kill_when_it_speaks(argv: list[str]) -> None:
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"copying\n"
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("image_id", ["", ".staging", "..", "../cache/x", "missing", "a/b"])
def test_what_is_no_id_is_not_found(cache: ImageCache, image_id: str) -> None:
    assert cache.find(image_id) is None


async def test_leftovers_of_a_killed_server_are_swept_and_live_ones_are_not(
    cache: ImageCache, image: Path, tmp_path: Path
) -> None:
    code = (
        "import asyncio, os, sys; from pathlib import Path\n"
        "from lumed.images.local import ImageCache\n"
        "def stuck(*_):\n"
        "    print('copying', flush=True)\n"
        "    sys.stdin.read()\n"
        "os.sendfile = stuck\n"
        "cache = ImageCache(Path(sys.argv[2]), {})\n"
        "asyncio.run(cache.import_file(Path(sys.argv[1]), print))\n"
    )
    argv = [sys.executable, "-c", code, str(image), str(tmp_path / "cache")]
    await asyncio.to_thread(kill_when_it_speaks, argv)
    live = tmp_path / "cache" / ".staging" / "live"
    live.mkdir()
    (tmp_path / "cache" / ".staging" / "no directory").touch()
    lock = take_lock(live / "owner.lock")
    assert lock is not None
    with contextlib.closing(lock):
        assert len(list((tmp_path / "cache" / ".staging").iterdir())) == 3
        assert await cache.sweep() == 1
        assert await cache.sweep() == 0
        assert live.is_dir()
    assert await cache.sweep() == 1
    assert not live.exists()


async def test_sweeping_before_the_first_import_is_nothing(cache: ImageCache) -> None:
    assert await cache.sweep() == 0


def builder(calls: list[Path], *, fail: bool = False) -> Callable[..., object]:
    async def build(directory: Path, say: Callable[[str], None]) -> BuiltImage:
        calls.append(directory)
        say("making the disk")
        disk = directory / "tiny.raw"
        disk.write_bytes(b"\xfa".ljust(510, b"\0") + b"\x55\xaa" + bytes(MIB))
        if fail:
            raise NotFound("no kernel")
        (directory / "vmlinuz").write_bytes(b"kernel")
        (directory / "initramfs").write_bytes(b"initramfs")
        return BuiltImage(disk, directory / "vmlinuz", directory / "initramfs")

    return build


async def test_a_builtin_image_is_built_once_and_has_its_kernel(tmp_path: Path) -> None:
    calls: list[Path] = []
    seen: list[str] = []
    builtins = {"tiny": Builtin("1", builder(calls))}  # type: ignore[arg-type]
    cache = ImageCache(tmp_path / "cache", builtins)
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(cache.get_builtin("tiny", lambda *r: seen.append(r[0])))
            for _ in range(3)
        ]
    assert len(calls) == 1
    assert seen == ["making the disk"]
    found = tasks[0].result()
    assert (found.id, found.name, found.facts.firmware) == ("tiny-1", "tiny", Firmware.BIOS)
    assert found.kernel is not None
    assert found.initramfs is not None
    assert (found.kernel.read_bytes(), found.initramfs.read_bytes()) == (b"kernel", b"initramfs")
    assert found.kernel.stat().st_mode & 0o777 == 0o444
    again = ImageCache(tmp_path / "cache", builtins)
    assert await again.get_builtin("tiny", quiet) == found
    assert len(calls) == 1
    newer = ImageCache(tmp_path / "cache", {"tiny": Builtin("2", builder(calls))})  # type: ignore[arg-type]
    assert (await newer.get_builtin("tiny", quiet)).id == "tiny-2"
    assert newer.find("tiny-1") == found


async def test_a_failed_build_leaves_nothing_and_the_next_one_works(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path / "cache", {"tiny": Builtin("1", builder([], fail=True))})  # type: ignore[arg-type]
    with pytest.raises(NotFound, match="no kernel"):
        await cache.get_builtin("tiny", quiet)
    assert names(tmp_path / "cache") == []


async def test_an_unknown_builtin_lists_the_known_ones(cache: ImageCache) -> None:
    with pytest.raises(NotFound, match="plan9") as caught:
        await cache.get_builtin("plan9", quiet)
    assert caught.value.hint == "built-in images: none"


async def test_progress_is_reported_in_the_thread_of_the_event_loop(
    cache: ImageCache, tmp_path: Path
) -> None:
    path = tmp_path / "big.img"
    path.write_bytes(b"x" * (32 * MIB))
    callers: set[int] = set()
    await cache.import_file(path, lambda *_: callers.add(threading.get_ident()))
    assert callers == {threading.get_ident()}
