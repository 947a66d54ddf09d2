"""VMs in the making and on their way out."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from lumed.errors import AlreadyExists, Busy, NotFound
from lumed.store.staging import remove_vm, start_staging, sweep
from lumed.store.vmdir import STAGING, TRASH, VmDir


def left_in(location: Path) -> list[str]:
    """Everything in a location, folders of ours aside."""
    found = (path.relative_to(location) for path in location.rglob("*"))
    return sorted(str(path) for path in found if str(path) not in (STAGING, TRASH))


async def test_a_published_vm_appears_whole_and_staging_leaves_nothing(tmp_path: Path) -> None:
    location = tmp_path / "new/vms"
    async with start_staging(location, "op-1") as staged:
        (staged.vm_dir.path / "disk").write_text("x")
        assert left_in(location) == [f"{STAGING}/{n}" for n in ("op-1", "op-1.lock", "op-1/disk")]
        vm_dir = staged.publish("web")
        assert vm_dir.path == location / "web"
    assert left_in(location) == ["web", "web/disk"]
    assert (location / "web").stat().st_mode & 0o777 == 0o700


async def test_what_is_not_published_is_removed_however_it_ends(tmp_path: Path) -> None:
    async def fail() -> None:
        async with start_staging(tmp_path, "op-1") as staged:
            (staged.vm_dir.path / "disk").write_text("x")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        await fail()
    assert left_in(tmp_path) == []

    entered = asyncio.Event()

    async def make() -> None:
        async with start_staging(tmp_path, "op-2") as staged:
            (staged.vm_dir.path / "disk").write_text("x")
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(make())
    await asyncio.wait_for(entered.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left_in(tmp_path) == []


async def test_a_cancel_before_the_folder_is_there_leaves_nothing(tmp_path: Path) -> None:
    async def make() -> None:
        async with start_staging(tmp_path, "op-1"):
            pytest.fail("it was cancelled before")

    task = asyncio.create_task(make())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left_in(tmp_path) == []


async def test_nothing_that_exists_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to("nowhere")
    async with start_staging(tmp_path, "op-1") as staged:
        for name in ("empty", "file", "link"):
            with pytest.raises(AlreadyExists, match=f"exists with name: {name}"):
                staged.publish(name)
    assert (tmp_path / "file").read_text() == "kept"
    assert left_in(tmp_path) == ["empty", "file", "link"]


async def test_an_operation_stages_once(tmp_path: Path) -> None:
    async with start_staging(tmp_path, "op-1") as staged:
        with pytest.raises(Busy):
            async with start_staging(tmp_path, "op-1"):
                pass
        staged.publish("web")
    assert left_in(tmp_path) == ["web"]


async def test_a_sweep_takes_what_is_dead_and_leaves_what_is_being_made(tmp_path: Path) -> None:
    staging = tmp_path / STAGING
    for dead in ("op-dead", "op-deader"):
        (staging / dead).mkdir(parents=True)
        (staging / dead / "disk").write_text("x")
    (staging / "op-dead.lock").touch()
    # Killed between the publication and the end of its staging.
    (staging / "op-published.lock").touch()
    (tmp_path / TRASH / "abc").mkdir(parents=True)
    async with start_staging(tmp_path, "op-alive") as staged:
        assert sweep([tmp_path, tmp_path / "not-there"]) == ["op-dead", "op-deader"]
        assert sweep([tmp_path]) == []
        staged.publish("web")
    assert left_in(tmp_path) == ["web"]


def test_a_sweep_waits_for_no_server_that_was_killed(tmp_path: Path) -> None:
    code = (
        "import asyncio, os, signal, sys; from pathlib import Path\n"
        "from lumed.store.staging import start_staging\n"
        "async def main():\n"
        "    async with start_staging(Path(sys.argv[1]), 'op-1'):\n"
        "        print('staged', flush=True); sys.stdin.read()\n"
        "asyncio.run(main())\n"
    )
    maker = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert maker.stdout is not None
        assert maker.stdout.readline() == b"staged\n"
        assert sweep([tmp_path]) == []
    finally:
        maker.kill()
        maker.communicate()
    assert sweep([tmp_path]) == ["op-1"]
    assert left_in(tmp_path) == []


def test_a_removed_vm_is_gone_at_once_and_from_the_disk(tmp_path: Path) -> None:
    vm_dir = VmDir(tmp_path / "web")
    vm_dir.path.mkdir()
    vm_dir.disk.write_text("x")
    remove_vm(vm_dir, "token")
    assert left_in(tmp_path) == []
    with pytest.raises(NotFound, match="Virtual machine not found: web"):
        remove_vm(vm_dir, "token2")
