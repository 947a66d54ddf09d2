from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from lumed.claim import find_holder, is_locked, take_lock, wait_unlocked
from lumed.osproc import ProcessId, boot_id, find_process, is_alive, send_signal, start_detached


def test_a_lock_can_be_asked_about_without_being_taken(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    assert not is_locked(path)
    lock = take_lock(path)
    assert lock is not None
    assert is_locked(path)
    assert take_lock(path) is None
    lock.close()
    assert not is_locked(path)


async def test_a_child_keeps_the_lock_until_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    lock = take_lock(path)
    assert lock is not None
    child = await start_detached(["/bin/sleep", "60"], log=tmp_path / "log", pass_fds=[lock.fd])
    try:
        lock.close()
        assert is_locked(path)
        assert find_holder(path) == child.identity.pid
    finally:
        send_signal(child.identity, signal.SIGKILL)
    async with asyncio.timeout(5):
        assert await child.exit_status == -signal.SIGKILL
    assert await wait_unlocked(path, 2)
    assert not is_alive(child.identity)


async def test_other_children_do_not_inherit_the_lock(tmp_path: Path) -> None:
    lock = take_lock(tmp_path / "run.lock")
    assert lock is not None
    child = await start_detached(["/bin/sleep", "60"], log=tmp_path / "log")
    try:
        lock.close()
        assert not is_locked(tmp_path / "run.lock")
    finally:
        send_signal(child.identity, signal.SIGKILL)
        await child.exit_status


def test_a_reused_pid_is_not_the_same_process() -> None:
    me = find_process(os.getpid())
    assert me is not None
    assert is_alive(me)
    earlier = ProcessId(boot_id(), me.pid, me.start_ticks - 1)
    assert not is_alive(earlier)
    assert not send_signal(earlier, signal.SIGKILL)
    assert not is_alive(ProcessId("another-boot", me.pid, me.start_ticks))


async def test_a_start_that_is_cancelled_leaves_no_process(tmp_path: Path) -> None:
    lock = take_lock(tmp_path / "run.lock")
    assert lock is not None
    for _ in range(20):
        starting = asyncio.create_task(
            start_detached(["/bin/sleep", "60"], log=tmp_path / "log", pass_fds=[lock.fd])
        )
        await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
    lock.close()
    assert await wait_unlocked(tmp_path / "run.lock", 2)
