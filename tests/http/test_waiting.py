"""Waiting for operations without asking again and again."""

from __future__ import annotations

import asyncio
import time

import pytest

from lumed.http.app import build_app
from lumed.service.local import LocalEngine
from tests.doubles.fake_driver import FakeDriver
from tests.http.conftest import Client, connect
from tests.http.test_vms import VMS, create

OPERATIONS = "/lume/operations"


async def begin_run(client: Client, driver: FakeDriver, name: str = "web") -> str:
    """The operation of a run that lasts until `driver.delay` is set."""
    await create(client, name, image="tiny")
    driver.delay = asyncio.Event()
    reply = await client.post(f"{VMS}/{name}/run", json={"network": "none", "noDisplay": True})
    return str(reply.json()["operation"])


async def test_many_wait_for_an_operation_and_hear_of_its_end_at_once(
    client: Client, driver: FakeDriver
) -> None:
    operation = await begin_run(client, driver)
    assert driver.delay is not None
    params = {"wait": 60}
    waiting = [
        asyncio.create_task(client.get(f"{OPERATIONS}/{operation}", params=params))
        for _ in range(20)
    ]
    await driver.launching.wait()
    # One that goes away takes nothing with it.
    waiting.pop().cancel()
    assert not any(task.done() for task in waiting)
    driver.delay.set()
    async with asyncio.timeout(5):
        replies = await asyncio.gather(*waiting)
    assert {reply.json()["status"] for reply in replies} == {"succeeded"}
    reply = await client.get(f"{OPERATIONS}/{operation}", params={"wait": 60})
    assert reply.json()["status"] == "succeeded"


async def test_a_wait_ends_with_how_it_is(client: Client, driver: FakeDriver) -> None:
    operation = await begin_run(client, driver)
    assert driver.delay is not None
    started = time.monotonic()
    reply = await client.get(f"{OPERATIONS}/{operation}", params={"wait": 0.2})
    assert (reply.status_code, reply.json()["status"]) == (200, "running")
    assert time.monotonic() - started >= 0.19
    driver.delay.set()
    await client.get(f"{OPERATIONS}/{operation}", params={"wait": 30})


async def test_who_waits_has_an_answer_when_the_server_ends(
    engine: LocalEngine, driver: FakeDriver
) -> None:
    ending = asyncio.Event()
    async with connect(build_app(engine, ending=ending)) as client:
        operation = await begin_run(client, driver)
        waiting = asyncio.create_task(client.get(f"{OPERATIONS}/{operation}", params={"wait": 60}))
        await driver.launching.wait()
        ending.set()
        async with asyncio.timeout(5):
            reply = await waiting
        assert (reply.status_code, reply.json()["status"]) == (200, "running")
    assert driver.delay is not None
    driver.delay.set()
    await engine.wait_operation(operation, 10)


@pytest.mark.parametrize("wait", ["-1", "61", "nan", "inf", "long"])
async def test_odd_waits_are_refused(client: Client, driver: FakeDriver, wait: str) -> None:
    reply = await client.get(f"{OPERATIONS}/op-1", params={"wait": wait})
    assert (reply.status_code, list(reply.json()["fields"])) == (422, ["wait"])
    assert (await client.get(f"{OPERATIONS}/op-1", params={"wait": "60"})).status_code == 404


async def test_operations_are_listed_by_status_target_and_action(
    client: Client, driver: FakeDriver
) -> None:
    operation = await begin_run(client, driver)
    await create(client, "other", image="tiny")
    (made,) = (await client.get(OPERATIONS, params={"target": "other"})).json()
    await client.get(f"{OPERATIONS}/{made['id']}", params={"wait": 30})

    async def ids(**params: str) -> list[str]:
        reply = await client.get(OPERATIONS, params=params)
        return [found["id"] for found in reply.json()]

    assert await ids(status="running") == [operation]
    assert operation in await ids(target="web")
    assert operation not in await ids(target="other")
    assert await ids(target="web", action="run", status="running") == [operation]
    assert await ids(action="run", status="failed") == []
    assert (await client.get(OPERATIONS, params={"status": "odd"})).status_code == 422
    assert driver.delay is not None
    driver.delay.set()
    await client.get(f"{OPERATIONS}/{operation}", params={"wait": 30})
