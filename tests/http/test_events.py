"""GET /lume/events: whatever changes a VM, a watcher hears of it, and of nothing that was not."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fastapi import FastAPI

from lumed.errors import MachineFailed, TimedOut
from lumed.files import write_atomic
from lumed.http.app import build_app
from lumed.machine.driver import MachineStatus
from lumed.service.local import LocalEngine
from lumed.store.index import StoredVm
from lumed.store.layout import Home
from tests.doubles.fake_driver import FakeDriver
from tests.http.conftest import Client, connect, start_fake_engine
from tests.http.reader import Event, Reader, reading
from tests.http.test_vms import VMS, create, run, wait_for_state

EVENTS = "/lume/events"


@pytest.fixture
def ending() -> asyncio.Event:
    return asyncio.Event()


@pytest.fixture
def app(engine: LocalEngine, ending: asyncio.Event) -> FastAPI:
    return build_app(engine, ending=ending)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[Client]:
    async with connect(app) as client:
        yield client


async def states_until(reader: Reader, last: str, first: str = "", name: str = "web") -> list[str]:
    """The states of a VM as they are told after `first`, without repetition, until one comes."""
    seen: list[str] = [first]
    while seen[-1] != last:
        event = await reader.next()
        if event.kind in ("vm", "vm-deleted") and event.data["name"] == name:
            state = event.kind if event.kind == "vm-deleted" else event.data["state"]
            seen += [state] if seen[-1:] != [state] else []
    return seen[1:]


async def test_a_stream_begins_with_a_reset_and_has_what_the_looks_have(
    app: FastAPI, client: Client
) -> None:
    await create(client, "old")
    async with reading(app, EVENTS) as reader:
        assert reader.headers["content-type"].startswith("text/event-stream")
        assert "content-length" not in reader.headers
        first = await reader.next()
        assert (first.kind, first.data) == ("reset", {"reason": "start"})
        vm = await create(client, "web", image="tiny")
        told = await reader.next_vm("web", state="stopped")
        assert told.data == vm
        assert "old" not in reader.text
        run, _, number = told.id.rpartition("-")
        assert (first.id, int(number) > 0) == (f"{run}-0", True)


async def test_the_life_of_a_vm_is_told_in_states_that_it_had(
    app: FastAPI, client: Client, driver: FakeDriver
) -> None:
    async with reading(app, EVENTS) as reader:
        await create(client, "web", image="tiny")
        assert await states_until(reader, "stopped") == ["provisioning", "stopped"]
        await run(client, "web", noDisplay=True)
        assert await states_until(reader, "running", "stopped") == ["starting", "running"]
        await client.post(f"{VMS}/web/stop", json={"force": True})
        assert await states_until(reader, "stopped", "running") == ["stopping", "stopped"]
        await run(client, "web", noDisplay=True)
        driver.machines[-1].crash()
        states = await states_until(reader, "crashed", "stopped")
        # A machine that ends as soon as it is up may not have been seen up.
        assert [state for state in states if state != "running"] == ["starting", "crashed"]
        await client.patch(f"{VMS}/web", json={"cpu": 3})
        await reader.next_vm("web", cpu=3)
        await client.delete(f"{VMS}/web")
        gone = await reader.next()
        assert (gone.kind, gone.data["name"], gone.data["cpu"]) == ("vm-deleted", "web", 3)


async def test_a_start_that_fails_is_told_as_crashed_never_as_stopped(
    app: FastAPI, client: Client, driver: FakeDriver
) -> None:
    await create(client, "web", image="tiny")
    driver.failure = "no such luck"
    async with reading(app, EVENTS) as reader:
        await client.post(f"{VMS}/web/run", json={"network": "none", "noDisplay": True})
        states = await states_until(reader, "crashed")
        assert [state for state in states if state != "starting"] == ["crashed"]


async def test_operations_are_told_from_begin_to_end(
    app: FastAPI, client: Client, driver: FakeDriver
) -> None:
    async with reading(app, EVENTS) as reader:
        reply = await client.post(
            VMS, json={"name": "web", "os": "linux", "cpu": 1, "memory": "64MB",
                       "diskSize": "64MB", "image": "tiny"}
        )  # fmt: skip
        operation = reply.json()["operation"]
        told: list[Event] = []
        while not told or told[-1].data["status"] == "running":
            event = await reader.next()
            told += [event] if event.kind == "operation" else []
        assert {event.data["id"] for event in told} == {operation}
        assert (told[0].data["stage"], told[-1].data["status"]) == ("starting", "succeeded")
        assert told[-1].data == (await client.get(f"/lume/operations/{operation}")).json()


async def test_a_watcher_of_one_vm_hears_of_no_other(app: FastAPI, client: Client) -> None:
    async with reading(app, f"{EVENTS}?vm=web") as reader:
        await create(client, "other", image="tiny")
        await create(client, "web", image="tiny")
        await reader.next_vm("web", state="stopped")
        assert "other" not in reader.text
    reply = await client.get(EVENTS, params={"vm": "../web"})
    assert (reply.status_code, list(reply.json()["fields"])) == (422, ["vm"])


async def test_who_returns_hears_what_was_missed(app: FastAPI, client: Client) -> None:
    async with reading(app, EVENTS) as reader:
        await create(client, "web", image="tiny")
        last = await reader.next_vm("web", state="stopped")
    await client.patch(f"{VMS}/web", json={"cpu": 3})
    await client.patch(f"{VMS}/web", json={"cpu": 4})
    async with reading(app, EVENTS, {"Last-Event-ID": last.id}) as reader:
        while (event := await reader.next()).data.get("cpu") != 4:
            assert event.kind != "reset"
        assert int(event.id.rpartition("-")[2]) > int(last.id.rpartition("-")[2])
    async with reading(app, f"{EVENTS}?lastEventId={event.id}") as reader:
        await client.patch(f"{VMS}/web", json={"cpu": 5})
        assert (await reader.next()).data["cpu"] == 5


@pytest.mark.parametrize("last", ["00000000-1", "nonsense", "-", "1-1-1", "é"])
async def test_an_id_of_another_server_means_to_list_anew(app: FastAPI, last: str) -> None:
    async with reading(app, EVENTS, {"Last-Event-ID": last}) as reader:
        assert (await reader.next()).data == {"reason": "restarted"}


async def test_another_server_run_has_other_ids(
    app: FastAPI, client: Client, engine: LocalEngine, home: Home
) -> None:
    async with reading(app, EVENTS) as reader:
        await create(client, "web", image="tiny")
        last = await reader.next_vm("web", state="stopped")
    await engine.close()
    async with start_fake_engine(home, FakeDriver()) as second:
        app = build_app(second)
        async with reading(app, EVENTS, {"Last-Event-ID": last.id}) as reader:
            assert (await reader.next()).data == {"reason": "restarted"}


async def test_a_reader_that_stands_still_is_told_to_list_anew(
    app: FastAPI, client: Client, monkeypatch: pytest.MonkeyPatch, engine: LocalEngine
) -> None:
    monkeypatch.setattr(engine._observer._notices, "_size", 20)
    await create(client, "web", image="tiny")
    async with reading(app, EVENTS) as slow, reading(app, EVENTS) as fast:
        await slow.next()
        slow.flows.clear()
        for number in range(1, 30):
            await client.patch(f"{VMS}/web", json={"cpu": number + 1})
            await fast.next_vm("web", cpu=number + 1)
        slow.flows.set()
        while (event := await slow.next()).kind != "reset":
            pass
        assert event.data == {"reason": "lost"}
        await client.patch(f"{VMS}/web", json={"cpu": 1})
        await slow.next_vm("web", cpu=1)


async def test_what_others_do_to_a_folder_is_told(app: FastAPI, client: Client, home: Home) -> None:
    await create(client, "web", image="tiny")
    folder = home.location("home") / "web"
    async with reading(app, EVENTS) as reader:
        await reader.next()
        config = folder / "config.json"
        text = await asyncio.to_thread(config.read_bytes)
        changed = text.replace(b'"cpuCount": 1', b'"cpuCount": 7')
        await asyncio.to_thread(write_atomic, config, changed)
        assert (await reader.next()).data["cpu"] == 7
        await asyncio.to_thread(write_atomic, config, b"{")
        assert (await reader.next()).data["state"] == "broken"
        await asyncio.to_thread(write_atomic, config, text)
        await reader.next_vm("web", state="stopped")
        copy = folder.with_name("copy")
        await asyncio.to_thread(shutil.copytree, folder, copy)
        await reader.next_vm("copy", state="stopped")
        await asyncio.to_thread(shutil.rmtree, copy)
        while (event := await reader.next()).kind != "vm-deleted":
            pass
        assert event.data["name"] == "copy"


async def test_a_look_that_was_overtaken_is_not_told(
    app: FastAPI,
    client: Client,
    driver: FakeDriver,
    engine: LocalEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reading_disk, go_on = threading.Event(), threading.Event()
    find_all = engine._index.find_all

    def find_slowly(name: str) -> list[StoredVm]:
        found = find_all(name)
        reading_disk.set()
        assert go_on.wait(10)
        return found

    await create(client, "web", image="tiny")
    async with reading(app, EVENTS) as reader:
        await run(client, "web", noDisplay=True)
        await reader.next_vm("web", state="running")
        monkeypatch.setattr(engine._index, "find_all", find_slowly)
        engine._mark("web")
        await asyncio.to_thread(reading_disk.wait, 10)
        driver.machines[-1].crash()
        await wait_for_state(client, "web", "crashed")
        # What the look has read is of a VM without an end, and its machine is gone by now.
        go_on.set()
        assert "stopped" not in await states_until(reader, "crashed", "running")


async def test_a_machine_that_falls_silent_is_told_while_somebody_watches(
    app: FastAPI, client: Client, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def be_silent(_: float) -> MachineStatus:
        raise TimedOut("no answer")

    monkeypatch.setattr("lumed.service.observer._ROUND_S", 0.05)
    await create(client, "web", image="tiny")
    async with reading(app, EVENTS) as reader:
        await run(client, "web", noDisplay=True)
        with monkeypatch.context() as patch:
            patch.setattr(driver.machines[-1], "query_status", be_silent)
            await reader.next_vm("web", state="unresponsive")
        await reader.next_vm("web", state="running")


async def test_a_connection_that_closes_at_the_end_is_no_silence(
    app: FastAPI, client: Client, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()

    async def be_gone(_: float) -> MachineStatus:
        asked.set()
        raise MachineFailed("QEMU is gone")

    await create(client, "web", image="tiny")
    async with reading(app, EVENTS) as reader:
        await run(client, "web", noDisplay=True)
        await reader.next_vm("web", state="running")
        monkeypatch.setattr("lumed.service.live._HEALTHY_FOR_S", 0)
        monkeypatch.setattr(driver.machines[-1], "query_status", be_gone)
        look = asyncio.create_task(client.get(f"{VMS}/web"))
        await asyncio.wait_for(asked.wait(), 5)
        driver.machines[-1].crash()
        assert (await look).json()["state"] in ("running", "crashed")
        assert "unresponsive" not in await states_until(reader, "crashed", "running")


async def test_64_watchers_hear_of_a_machines_end_at_once(
    app: FastAPI, client: Client, driver: FakeDriver
) -> None:
    await create(client, "web", image="tiny")
    async with contextlib.AsyncExitStack() as stack:
        readers = [await stack.enter_async_context(reading(app, EVENTS)) for _ in range(64)]
        await run(client, "web", noDisplay=True)
        await asyncio.gather(*(r.next_vm("web", state="running") for r in readers))
        started = time.monotonic()
        driver.machines[-1].crash()
        await asyncio.gather(*(r.next_vm("web", state="crashed") for r in readers))
        assert time.monotonic() - started < 1


async def test_streams_end_with_the_server(app: FastAPI, ending: asyncio.Event) -> None:
    async with reading(app, EVENTS) as reader, reading(app, EVENTS) as stuck:
        await reader.next()
        await stuck.next()
        ending.set()
        await reader.wait_for(lambda: reader.is_over)
        await stuck.wait_for(lambda: stuck.is_over)


async def test_nothing_is_left_of_watchers_that_have_gone(app: FastAPI, client: Client) -> None:
    def count_descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    async with reading(app, EVENTS) as reader:
        await reader.next()
    # The one that looks when something is changed stays.
    descriptors, tasks = await asyncio.to_thread(count_descriptors), asyncio.all_tasks()
    for _ in range(20):
        async with reading(app, EVENTS) as reader:
            await reader.next()
    if left := asyncio.all_tasks() - tasks:
        _, left = await asyncio.wait(left, timeout=5)
    assert not left
    assert await asyncio.to_thread(count_descriptors) <= descriptors
