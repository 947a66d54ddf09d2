"""Blocking work that is cancelled."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from lumed.threads import run_to_end


async def test_the_result_and_the_error_come_back() -> None:
    assert await run_to_end(lambda: 42) == 42
    with pytest.raises(ZeroDivisionError):
        await run_to_end(lambda: 1 // 0)


async def test_a_cancellation_tells_the_work_and_waits_for_its_end() -> None:
    started = asyncio.Event()
    told = threading.Event()
    finished = threading.Event()
    loop = asyncio.get_running_loop()

    def work() -> None:
        loop.call_soon_threadsafe(started.set)
        assert told.wait(10)
        finished.set()
        raise RuntimeError("not seen by anybody, and not reported as forgotten")

    task = asyncio.create_task(run_to_end(work, on_cancel=told.set))
    await asyncio.wait_for(started.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert finished.is_set()


async def test_a_second_cancellation_does_not_leave_the_work_alone() -> None:
    cancelled = asyncio.Event()
    go_on = threading.Event()
    task = asyncio.create_task(run_to_end(lambda: go_on.wait(10), on_cancel=cancelled.set))
    await asyncio.sleep(0)  # it has begun
    task.cancel()
    await asyncio.wait_for(cancelled.wait(), 10)
    task.cancel()
    await asyncio.sleep(0)  # the second cancellation has arrived
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_work_that_is_still_queued_when_it_is_cancelled_never_runs() -> None:
    go_on = threading.Event()
    ran = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        first = asyncio.create_task(run_to_end(lambda: go_on.wait(10), executor=executor))
        second = asyncio.create_task(run_to_end(ran.set, executor=executor))
        await asyncio.sleep(0)  # both are queued
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(second, 5)
        go_on.set()
        assert await first
    assert not ran.is_set()
