"""The listener for today's clients: the same API, in which `diskSize` is an object."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI

from lumed.http.app import build_app
from lumed.http.guard import Guard, Rules
from lumed.service.local import LocalEngine
from lumed.units import MIB
from tests.http.conftest import Client, connect
from tests.http.reader import reading
from tests.http.test_vms import VMS, create, run, wait_for_state


@pytest.fixture
def app(engine: LocalEngine) -> FastAPI:
    return build_app(engine)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[Client]:
    """Of the listener that speaks the document."""
    async with connect(app) as client:
        yield client


@pytest.fixture
async def compat(app: FastAPI) -> AsyncIterator[Client]:
    """Of the other listener on the same application."""
    async with connect(app, Rules(compat=True)) as client:
        yield client


def assert_object(vm: dict[str, Any], total_bytes: int) -> None:
    """In bytes, as integers, and the same under the key that both listeners have."""
    assert vm["diskSize"].keys() == {"allocated", "total"}
    assert all(type(number) is int for number in vm["diskSize"].values())
    assert vm["diskSize"]["total"] == total_bytes
    assert vm["diskSize"] == vm["disk"]


async def test_every_answer_that_holds_a_vm_has_the_object(compat: Client) -> None:
    size = 64 * MIB
    reply = await compat.post(
        VMS,
        json={"name": "web", "os": "linux", "cpu": 1, "memory": "64MB", "diskSize": "64MB"},
    )
    assert reply.status_code == 202
    assert_object(reply.json(), size)
    await wait_for_state(compat, "web", "stopped")
    reply = await compat.patch(f"{VMS}/web", json={"disk_size": "96MB"})
    size = 96 * MIB
    assert_object(reply.json(), size)
    reply = await compat.post(f"{VMS}/clone", json={"name": "web", "new_name": "web-2"})
    assert_object(reply.json(), size)
    assert_object((await compat.get(f"{VMS}/web-2")).json(), size)
    for vm in (await compat.get(VMS)).json():
        assert_object(vm, size)
    await run(compat, "web")
    for vm in (await compat.get(VMS)).json():
        assert_object(vm, size)
    assert_object((await compat.post(f"{VMS}/web/stop")).json(), size)


async def test_a_run_that_was_accepted_has_the_object(compat: Client) -> None:
    await create(compat, "web", image="tiny")
    reply = await compat.post(f"{VMS}/web/run", json={"noDisplay": True})
    assert reply.status_code == 202
    assert_object(reply.json(), 64 * MIB)
    await wait_for_state(compat, "web", "running")


@pytest.mark.parametrize("path", ["/lume/images/pull", "/lume/pull/start"])
async def test_a_pull_that_was_accepted_has_the_object(compat: Client, path: str) -> None:
    body = {"image": "none:1", "registry": "127.0.0.1:1", "organization": "x", "name": "web"}
    reply = await compat.post(path, json=body)
    assert reply.status_code == 202
    assert_object(reply.json(), 0)


async def test_each_listener_keeps_its_shape_however_they_are_asked_in_turn(
    client: Client, compat: Client
) -> None:
    for name in ("a", "b"):
        await create(client, name)
    for _ in range(2):
        for path in (VMS, f"{VMS}/a"):
            mine, theirs = (await client.get(path)).json(), (await compat.get(path)).json()
            both = zip(mine, theirs, strict=True) if isinstance(mine, list) else [(mine, theirs)]
            for vm, other in both:
                assert vm["diskSize"] == "64MB"
                assert_object(other, 64 * MIB)
                # Nothing else differs.
                assert {**vm, "diskSize": None} == {**other, "diskSize": None}


async def test_an_unchanged_vm_is_encoded_once_for_each_listener(
    client: Client, compat: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        await create(client, name)
    lists = [(await each.get(VMS)).content for each in (client, compat)]

    def fail(_: object) -> None:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr("lumed.http.shapes.vm_object", fail)
        for _ in range(2):
            assert [(await each.get(VMS)).content for each in (client, compat)] == lists


async def test_events_have_the_object_too(app: FastAPI, client: Client) -> None:
    guards = [Guard(app, Rules(compat=compat)) for compat in (False, True)]
    async with (
        reading(guards[0], "/lume/events") as mine,
        reading(guards[1], "/lume/events") as its,
    ):
        made = await create(client, "web")
        told = (await mine.next_vm("web", state="stopped")).data
        assert told["diskSize"] == made["diskSize"] == "64MB"
        assert_object((await its.next_vm("web", state="stopped")).data, 64 * MIB)


async def test_its_openapi_document_says_what_it_answers(client: Client, compat: Client) -> None:
    mine, theirs = [(await each.get("/openapi.json")).json() for each in (client, compat)]
    for name in ("VmObject", "VmReply", "CloneReply"):
        assert mine["components"]["schemas"][name]["properties"]["diskSize"]["type"] == "string"
        said = theirs["components"]["schemas"][name]
        assert said["properties"]["diskSize"] == said["properties"]["disk"]
        for example in said["examples"]:
            assert example["diskSize"].keys() == {"allocated", "total"}
    for name in ("CreateBody", "UpdateBody"):
        assert mine["components"]["schemas"][name] == theirs["components"]["schemas"][name]
    assert mine["paths"] == theirs["paths"]
    assert (await client.get("/openapi.json")).json() == mine


async def test_the_guard_is_the_same(compat: Client) -> None:
    for headers in ({"host": "evil.example"}, {"origin": "http://evil.example"}):
        reply = await compat.get(VMS, headers=headers)
        assert (reply.status_code, reply.json()["code"]) == (403, "refused")
