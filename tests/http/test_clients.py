"""What clients in the field send, and what they take an answer for (contract, sections 1 to 6).

Read in the sources of pylume 0.2, cua-computer 0.1 to 0.5 and cua-sandbox 0.1 to 0.9, and seen
when they were run: they poll, look at a few keys, and take an unexpected null, word or key for
something else.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from lumed.model.vm import VmState
from lumed.store.layout import Home
from lumed.units import GIB, MIB
from tests.doubles.fake_driver import FakeDriver
from tests.http.conftest import Client
from tests.http.test_vms import ALWAYS, SMALL, VMS, create, run, wait_for, wait_for_state

# Nobody listens there.
NO_REGISTRY = {"registry": "127.0.0.1:1", "organization": "x"}


def assert_told(value: Any) -> None:
    """No null anywhere, and no empty text: one client reads null as an address."""
    assert value is not None
    assert value != ""
    for part in value.values() if isinstance(value, dict) else ():
        assert_told(part)
    for part in value if isinstance(value, list) else ():
        assert_told(part)


def assert_success(vm: dict[str, Any]) -> None:
    assert_told(vm)
    # One client knows failure only by this key.
    assert "error" not in vm
    assert vm.keys() >= ALWAYS
    assert vm["state"] == vm["status"]


async def test_what_is_not_known_is_left_out_in_every_state(
    client: Client, driver: FakeDriver, home: Home
) -> None:
    seen = set()

    async def look(answer: dict[str, Any]) -> None:
        listed = (await client.get(VMS)).json()
        alone = (await client.get(f"{VMS}/web")).json()
        for vm in (answer, alone, *listed):
            assert_success(vm)
            seen.add(vm["state"])
        assert "ipAddress" not in alone or alone["state"] == "running"
        if alone["state"] != "running":
            assert alone.keys().isdisjoint({"vncUrl", "vncPort", "sshAvailable"})

    await look((await client.post(VMS, json={"name": "web", **SMALL, "image": "tiny"})).json())
    await look(await wait_for_state(client, "web", "stopped"))
    driver.delay = asyncio.Event()
    await look((await client.post(f"{VMS}/web/run", json={"network": "none"})).json())
    driver.delay.set()
    await look(await wait_for_state(client, "web", "running"))
    await look((await client.post(f"{VMS}/web/stop")).json())
    await look((await client.put(f"{VMS}/web", json={"cpu": 2})).json())
    await look((await client.post(f"{VMS}/clone", json={"name": "web", "newName": "b"})).json())
    await look(await run(client, "web"))
    driver.machines[-1].crash()
    await look(await wait_for_state(client, "web", "crashed"))
    (home.location("home") / "web/config.json").write_text("{")
    await look((await client.get(f"{VMS}/web")).json())
    assert seen == {"provisioning", "stopped", "starting", "running", "crashed", "broken"}


def test_no_state_is_taken_for_a_failure_by_its_word() -> None:
    for state in VmState:
        assert "error" not in state.value.lower()


async def test_a_machine_without_a_screen_has_no_address_of_one(client: Client) -> None:
    await create(client, "web")
    vm = await run(client, "web", noDisplay=True, vnc="disabled")
    assert vm.keys().isdisjoint({"vncUrl", "vncPort"})


# What they send


async def test_a_run_takes_what_is_sent_beside_its_fields(client: Client) -> None:
    await create(client, "web", memory="64MB")
    sent = {"cpu": 4, "memory": "8GB", "display": {"width": 1024}, "sharedDirectories": []}
    vm = await run(client, "web", **sent)
    # They are not settings of a run.
    assert (vm["cpu"], vm["memory"]) == (1, "64MB")


async def test_null_is_the_same_as_absent(client: Client) -> None:
    create_fields = ("display", "ipsw", "storage", "image", "network", "userData", "sshKeys")
    vm = await create(client, "web", **dict.fromkeys((*create_fields, "ports", "firmware")))
    assert (vm["display"], vm["locationName"], vm["networkMode"]) == ("1024x768", "home", "nat")
    nothing = dict.fromkeys(("cpu", "memory", "diskSize", "display", "storage"))
    reply = await client.put(f"{VMS}/web", json={**nothing, "cpu": 2})
    assert reply.status_code == 200, reply.text
    assert (reply.json()["cpu"], reply.json()["memory"]) == (2, "64MB")
    run_fields = ("noDisplay", "sharedDirectories", "recoveryMode", "storage", "mount", "vnc")
    await run(client, "web", **dict.fromkeys(run_fields))
    assert (await client.post(f"{VMS}/web/stop", json={"storage": None})).status_code == 200
    null = dict.fromkeys(("name", "storage", "username", "password"))
    reply = await client.post("/lume/pull/start", json={"image": "a:1", **NO_REGISTRY, **null})
    assert (reply.status_code, reply.json()["name"]) == (202, "a")


@pytest.mark.parametrize("os", ["linux", "Linux", "LINUX"])
async def test_the_guests_os_is_told_in_one_spelling(client: Client, os: str) -> None:
    assert (await create(client, "web", os=os))["os"] == "linux"


@pytest.mark.parametrize("os", ["macOS", "macos", "MACOS"])
async def test_macos_is_understood_and_refused_with_its_reason(client: Client, os: str) -> None:
    reply = await client.post(VMS, json={"name": "web", **SMALL, "os": os})
    assert (reply.status_code, reply.json()["code"]) == (501, "not_possible_here")


@pytest.mark.parametrize(
    ("memory", "memory_bytes"),
    [("1", GIB), ("8.0GB", 8 * GIB), ("1.5g", 3 * GIB // 2), ("512mib", 512 * MIB), (GIB, GIB)],
)
async def test_numbers_come_as_text_and_sizes_in_many_ways(
    client: Client, memory: object, memory_bytes: int
) -> None:
    vm = await create(client, "web", cpu="2", memory=memory)
    assert (vm["cpu"], vm["memorySize"]) == (2, memory_bytes)
    reply = await client.post(f"{VMS}/web/update", json={"cpu": "3", "memory": memory})
    assert (reply.status_code, reply.json()["cpu"]) == (200, 3)
    assert reply.json()["memorySize"] == memory_bytes


@pytest.mark.parametrize("where", ["ephemeral", "path"])
async def test_a_storage_comes_in_the_body_or_percent_encoded_in_the_query(
    client: Client, tmp_path: Path, where: str
) -> None:
    storage = where if where == "ephemeral" else str(tmp_path / "a place")
    query = f"?storage={quote(storage, safe='')}"
    await create(client, "web", storage=storage)
    assert (await client.get(f"{VMS}/web{query}")).json()["locationName"] == storage
    assert [vm["name"] for vm in (await client.get(f"{VMS}/{query}")).json()] == ["web"]
    assert (await client.get(f"{VMS}?storage=ssd")).json() == []
    reply = await client.post(f"{VMS}/web/update", json={"cpu": 2, "storage": storage})
    assert reply.status_code == 200
    stops: list[dict[str, Any]] = [{}, {"json": {}}, {"json": {"storage": storage}}, {}]
    for number, options in enumerate(stops):
        await run(client, "web", storage=storage)
        path = f"{VMS}/web/stop{query if number == 3 else ''}"
        reply = await client.post(path, **options)
        assert (reply.status_code, reply.json()["state"]) == (200, "stopped")
    wrong = {"storage": "ssd"}
    assert (await client.post(f"{VMS}/web/stop", json=wrong)).status_code == 404
    assert (await client.delete(f"{VMS}/web?storage=ssd")).status_code == 404
    reply = await client.delete(f"{VMS}/web{query}")
    assert (reply.status_code, reply.json()["name"]) == (200, "web")


async def test_a_list_is_a_bare_array_also_with_a_slash_after_it(client: Client) -> None:
    """cua-computer looks for a key `vms` in it, and finds no VM in Lume either."""
    assert (await client.get(f"{VMS}/")).json() == []
    await create(client, "web")
    for path in (VMS, f"{VMS}/"):
        reply = await client.get(path)
        assert (reply.status_code, [vm["name"] for vm in reply.json()]) == (200, ["web"])


# Pulls


async def test_the_start_of_a_pull_is_never_answered_404(client: Client) -> None:
    """A client would take the server for an old one, and pull in another way."""
    await create(client, "there")
    image = {"image": "a:1", **NO_REGISTRY}
    bodies: list[tuple[dict[str, Any], int]] = [
        ({}, 422),
        ({**image, "storage": "floppy"}, 422),
        ({**image, "image": ""}, 422),
        ({**image, "image": "A:1"}, 422),
        ({**image, "name": "../x"}, 422),
        ({**image, "name": "there"}, 409),
        ({**image, "name": "new"}, 202),
    ]
    for path in ("/lume/pull/start", "/lume/images/pull"):
        for body, status in bodies:
            reply = await client.post(path, json=body)
            assert reply.status_code == status, (body, reply.text)
            if status == 202:
                assert_success(reply.json())
                assert reply.json()["state"] == "pulling"
        assert (await client.delete(f"{VMS}/new")).status_code == 200


async def test_a_pull_is_seen_until_it_is_over_and_its_failure_after_it(client: Client) -> None:
    name = {"name": "web", "image": "a:1"}
    reply = await client.post("/lume/pull/start", json={**name, **NO_REGISTRY})
    assert (reply.json()["message"], reply.json()["image"]) == ("Pull started", "a:1")
    async with asyncio.timeout(20):
        while (reply := await client.get(f"{VMS}/web")).status_code == 200:
            assert reply.json()["status"] == "pulling"
            assert isinstance(reply.json()["downloadProgress"], float)
            await asyncio.sleep(0.01)
    assert reply.status_code == 400
    assert reply.json()["message"].startswith("Pull failed for 'web': ")
    # Two clients try again on that text.
    assert "Invalid request body" not in reply.text
    reply = await client.post("/lume/pull", json={**name, **NO_REGISTRY})
    assert reply.status_code == 502
    assert reply.json()["message"] == reply.json()["error"]
    assert (await client.get(f"{VMS}/web")).status_code == 400
    await create(client, "web")


# Failures


async def test_every_failure_has_the_one_shape_and_only_a_bad_body_is_called_one(
    client: Client,
) -> None:
    await create(client, "web")
    failures = [
        (400, await client.post(VMS, content=b"[]")),
        (404, await client.get(f"{VMS}/none")),
        (404, await client.get("/lume/none")),
        (405, await client.delete(VMS)),
        (409, await client.post(VMS, json={"name": "web", **SMALL})),
        (415, await client.post(VMS, content=b"a", headers={"content-type": "text/plain"})),
        (422, await client.post(VMS, json={})),
        (422, await client.post(VMS, json={"name": "x", **SMALL, "cpu": "many"})),
        (422, await client.post("/lume/config", json={"cachingEnabled": "perhaps"})),
        (501, await client.get("/lume/ipsw")),
    ]
    for status, reply in failures:
        assert reply.status_code == status, reply.text
        assert reply.headers["content-type"] == "application/json"
        body = reply.json()
        assert_told(body)
        assert body.keys() <= {"message", "error", "code", "hint", "fields"}
        assert body["message"] == body["error"]
        assert ("Invalid request body" in body["message"]) == (status == 400)
        assert ("fields" in body) or status != 422


async def test_a_failed_operation_is_not_a_failed_call(client: Client, driver: FakeDriver) -> None:
    await create(client, "web")
    driver.failure = "no"
    reply = await client.post(f"{VMS}/web/run", json={"network": "none"})
    path = f"/lume/operations/{reply.json()['operation']}"
    operation = await wait_for(client, path, "status", "failed")
    assert operation["failure"]["message"] == "no"
    for body in (operation, (await client.get("/lume/operations")).json()[0]):
        assert "error" not in body
