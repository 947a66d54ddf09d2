"""One named action per VM at a time."""

from __future__ import annotations

import asyncio

import pytest

from lumed.errors import Busy
from lumed.service.gate import Gate

RUN = frozenset({"run"})


async def test_the_second_action_is_told_of_the_first() -> None:
    gate = Gate()
    assert gate.action("web") is None
    gate.enter("web", "run", "web")
    with pytest.raises(Busy, match="Virtual machine web is busy: run") as caught:
        gate.enter("web", "delete", "web")
    assert caught.value.fields == {"action": "run", "name": "web"}
    gate.enter("other", "delete", "other")
    gate.leave("web")
    gate.enter("web", "delete", "web")
    assert gate.action("web") == "delete"


async def test_who_may_wait_goes_on_when_the_first_has_left() -> None:
    gate = Gate()
    gate.enter("web", "run", "web")
    order: list[str] = []

    async def stop() -> None:
        async with gate.wait_for("web", "stop", "web", behind=RUN, timeout_s=5):
            order.append("stop")
            assert gate.action("web") == "stop"

    stopping = asyncio.create_task(stop())
    await asyncio.sleep(0)
    order.append("run")
    gate.leave("web")
    await stopping
    assert order == ["run", "stop"]
    assert gate.action("web") is None


async def test_who_waits_goes_on_waiting_behind_the_next_one() -> None:
    gate = Gate()
    gate.enter("web", "run", "web")

    async def stop() -> None:
        async with gate.wait_for("web", "stop", "web", behind=RUN, timeout_s=5):
            pass

    stopping = asyncio.create_task(stop())
    await asyncio.sleep(0)
    gate.leave("web")
    gate.enter("web", "run", "web")
    for _ in range(3):
        await asyncio.sleep(0)
    assert not stopping.done()
    gate.leave("web")
    await stopping


async def test_of_two_that_wait_one_is_busy() -> None:
    gate = Gate()
    gate.enter("web", "run", "web")

    async def hold(action: str) -> str:
        async with gate.wait_for("web", action, "web", behind=RUN, timeout_s=5):
            await asyncio.sleep(0)
            return action

    waiting = [asyncio.create_task(hold(action)) for action in ("stop", "delete")]
    await asyncio.sleep(0)
    gate.leave("web")
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert results[0] == "stop"
    assert isinstance(results[1], Busy)
    assert gate.action("web") is None


async def test_nobody_waits_behind_other_actions_or_for_ever() -> None:
    gate = Gate()
    gate.enter("web", "delete", "web")
    with pytest.raises(Busy, match="busy: delete"):
        async with gate.wait_for("web", "stop", "web", behind=RUN, timeout_s=5):
            pass
    gate.leave("web")
    gate.enter("web", "run", "web")
    with pytest.raises(Busy, match="busy: run"):
        async with gate.wait_for("web", "stop", "web", behind=RUN, timeout_s=0.01):
            pass
    assert gate.action("web") == "run"


async def test_a_failed_or_cancelled_action_leaves_the_gate() -> None:
    gate = Gate()

    async def act(event: asyncio.Event) -> None:
        async with gate.wait_for("web", "stop", "web", behind=RUN, timeout_s=0):
            event.set()
            await asyncio.Event().wait()

    inside = asyncio.Event()
    task = asyncio.create_task(act(inside))
    await inside.wait()
    task.cancel()
    await asyncio.wait({task})
    assert gate.action("web") is None
