"""Numbered notices, and how often the progress of an operation is one."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from lumed.model.notice import Notice, NoticeKind, ResetReason
from lumed.model.operation import Operation, OperationStatus
from lumed.model.view import VmView
from lumed.model.vm import Display, GuestOs, VmState
from lumed.service.notices import Notices

RUNNING = Operation("op-1", "pull", "web", OperationStatus.RUNNING, "starting", "2026-01-01")
OVER = replace(RUNNING, status=OperationStatus.SUCCEEDED, stage="over")
VIEW = VmView("web", VmState.STOPPED, GuestOs.LINUX, 1, 1, 1, 1, Display(), "home", "nat")


def bytes_told(notices: list[Notice]) -> list[int | None]:
    return [notice.operation.bytes_done for notice in notices if notice.operation is not None]


async def test_progress_is_told_at_intervals_begin_and_end_at_once() -> None:
    notices = Notices()
    subscription = notices.subscribe(None, None)
    (reset,) = await subscription.wait(1)
    assert (reset.kind, reset.reason) == (NoticeKind.RESET, ResetReason.START)
    for done in range(100):
        notices.tell_operation(replace(RUNNING, bytes_done=done))
    assert bytes_told(await subscription.wait(1)) == [0]
    # The last of them, although nothing else comes.
    assert bytes_told(await subscription.wait(1)) == [99]
    for done in range(100, 200):
        notices.tell_operation(replace(RUNNING, bytes_done=done))
    notices.tell_operation(replace(OVER, bytes_done=200))
    assert bytes_told(await subscription.wait(1)) == [200]
    assert await subscription.wait(0.3) == []


async def test_long_progress_pushes_nothing_out() -> None:
    notices = Notices(kept=4)
    notices.tell_vm(VIEW)
    first = notices.last
    reader, late = notices.subscribe(None, None), notices.subscribe(None, None)
    await reader.wait(1)
    await late.wait(1)
    for done in range(8):
        notices.tell_operation(replace(RUNNING, bytes_done=done))
        assert bytes_told(await reader.wait(1)) == [done]
    assert bytes_told(await late.wait(1)) == [0, 7]
    assert notices.read(first - 1) is not None


async def test_one_who_is_too_far_behind_lists_anew() -> None:
    notices = Notices(kept=4)
    subscription = notices.subscribe(None, None)
    await subscription.wait(1)
    for _ in range(5):
        notices.tell_vm(VIEW)
    (reset,) = await subscription.wait(1)
    assert (reset.kind, reset.reason) == (NoticeKind.RESET, ResetReason.LOST)
    assert await notices.subscribe(reset.id, None).wait(0) == []
    for odd in (reset.id + "9", reset.id + "9" * 9999, reset.id + "x"):
        (reset,) = await notices.subscribe(odd, None).wait(0)
        assert reset.reason is ResetReason.RESTARTED
    notices.tell_vm(VIEW, deleted=True)
    (told,) = await subscription.wait(1)
    assert told.kind is NoticeKind.VM_DELETED


async def test_readers_wait_without_waking_for_what_concerns_others() -> None:
    notices = Notices()
    subscription = notices.subscribe(None, "other")
    await subscription.wait(1)
    waiting = asyncio.create_task(subscription.wait(5))
    notices.tell_vm(VIEW)
    await asyncio.sleep(0)
    assert not waiting.done()
    notices.tell_vm(replace(VIEW, name="other"))
    (told,) = await waiting
    assert told.vm is not None
    assert told.vm.name == "other"
