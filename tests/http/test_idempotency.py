"""The Idempotency-Key of writes: the same request has the same answer, and is carried out once."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest

from lumed.errors import MissingDependency
from lumed.http.app import build_app
from lumed.http.guard import Rules
from lumed.service.local import LocalEngine
from lumed.store.layout import Home
from tests.doubles.fake_driver import FakeDriver
from tests.http.conftest import Client, connect, end_machines, start_fake_engine
from tests.http.test_vms import SMALL, VMS, create, run, wait_for_state

WEB = {"name": "web", **SMALL, "image": "tiny"}


def with_key(key: str | None = None) -> dict[str, str]:
    return {"Idempotency-Key": key or str(uuid.uuid4())}


async def test_a_create_that_comes_again_has_the_same_answer(client: Client) -> None:
    key = with_key()
    first = await client.post(VMS, json=WEB, headers=key)
    assert first.status_code == 202
    assert "idempotency-replayed" not in first.headers
    # Another spelling of the path is the same request.
    for path in (VMS, "/vms", f"{VMS}/"):
        again = await client.post(path, json=WEB, headers=key)
        assert (again.status_code, again.content) == (202, first.content)
        assert again.headers["idempotency-replayed"] == "true"
        assert again.headers["content-type"] == first.headers["content-type"]
    await wait_for_state(client, "web", "stopped")
    assert len((await client.get("/lume/operations")).json()) == 1
    assert (await client.post(VMS, json=WEB, headers=with_key())).status_code == 409
    assert (await client.post(VMS, json=WEB)).status_code == 409


async def test_each_kind_of_write_can_have_a_key(client: Client) -> None:
    await create(client, "web", image="tiny")
    for method, path, body in (
        ("PUT", f"{VMS}/web", {"cpu": 2}),
        ("PATCH", f"{VMS}/web", {"cpu": 3}),
        ("POST", f"{VMS}/clone", {"name": "web", "newName": "copy"}),
        ("DELETE", f"{VMS}/copy", None),
    ):
        key = with_key()
        replies = [await client.request(method, path, json=body, headers=key) for _ in range(2)]
        assert [reply.status_code for reply in replies] == [200, 200], replies[1].text
        assert replies[0].content == replies[1].content
        assert replies[1].headers["idempotency-replayed"] == "true"
    assert [vm["name"] for vm in (await client.get(VMS)).json()] == ["web"]


async def test_a_refusal_is_an_answer_too(client: Client) -> None:
    key = with_key()
    first = await client.delete(f"{VMS}/web", headers=key)
    assert first.status_code == 404
    await create(client, "web")
    again = await client.delete(f"{VMS}/web", headers=key)
    assert (again.status_code, again.content) == (404, first.content)
    assert (await client.get(f"{VMS}/web")).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", VMS, {**WEB, "cpu": 2}),
        ("POST", f"{VMS}?storage=home", WEB),
        ("POST", f"{VMS}/clone", WEB),
        ("PUT", VMS, WEB),
        ("DELETE", f"{VMS}/web", None),
    ],
)
async def test_a_key_belongs_to_one_request(
    client: Client, method: str, path: str, body: dict[str, Any] | None
) -> None:
    key = with_key()
    await client.post(VMS, json=WEB, headers=key)
    reply = await client.request(method, path, json=body, headers=key)
    assert (reply.status_code, reply.json()["code"]) == (422, "key_reused")
    assert list(reply.json()["fields"]) == ["Idempotency-Key"]


async def test_odd_keys_are_refused_and_reads_need_none(client: Client) -> None:
    for key in ("", "two words", "x" * 256, "t\tab"):
        reply = await client.post(VMS, json=WEB, headers=[("Idempotency-Key", key)])
        assert reply.status_code == 422, key
        assert list(reply.json()["fields"]) == ["Idempotency-Key"]
    twice = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    assert (await client.post(VMS, json=WEB, headers=twice)).status_code == 422
    assert (await client.get(VMS, headers=with_key("two words"))).json() == []
    assert (await client.post(VMS, json=WEB, headers=with_key("x" * 255))).status_code == 202


async def test_a_fault_is_not_kept(
    client: Client, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise MissingDependency("no QEMU")

    async def explode(*_: object) -> None:
        raise ZeroDivisionError

    key = with_key()
    for failure, status in ((fail, 503), (explode, 500)):
        with monkeypatch.context() as patch:
            patch.setattr(engine, "create_vm", failure)
            patch.setattr(client._transport, "raise_app_exceptions", False)
            assert (await client.post(VMS, json=WEB, headers=key)).status_code == status
    assert (await client.post(VMS, json=WEB, headers=key)).status_code == 202


async def test_being_busy_is_not_kept(client: Client, driver: FakeDriver) -> None:
    await create(client, "web", image="tiny")
    driver.delay = asyncio.Event()
    options = {"network": "none", "noDisplay": True}
    operation = (await client.post(f"{VMS}/web/run", json=options)).json()["operation"]
    key = with_key()
    first = await client.post(f"{VMS}/web/run", json=options, headers=key)
    assert (first.status_code, first.json()["code"]) == (409, "busy")
    driver.delay.set()
    await client.get(f"/lume/operations/{operation}", params={"wait": 10})
    again = await client.post(f"{VMS}/web/run", json=options, headers=key)
    assert (again.status_code, again.json()["code"]) == (409, "wrong_state")


async def test_who_comes_meanwhile_joins(client: Client, driver: FakeDriver) -> None:
    await create(client, "web", image="tiny")
    await run(client, "web", noDisplay=True)
    over = asyncio.Event()
    driver.machines[-1].open_agent(over)
    key = with_key()

    async def stop() -> Any:
        return await client.post(f"{VMS}/web/stop", headers=key)

    stops = [asyncio.create_task(stop()) for _ in range(5)]
    await wait_for_state(client, "web", "stopping")
    over.set()
    replies = await asyncio.gather(*stops)
    assert {reply.status_code for reply in replies} == {200}
    assert len({reply.content for reply in replies}) == 1
    replayed = [reply for reply in replies if "idempotency-replayed" in reply.headers]
    assert len(replayed) == 4


async def test_a_client_that_has_left_finds_the_answer(client: Client, driver: FakeDriver) -> None:
    await create(client, "web", image="tiny")
    await run(client, "web", noDisplay=True)
    over = asyncio.Event()
    driver.machines[-1].open_agent(over)
    key = with_key()
    lost = asyncio.create_task(client.post(f"{VMS}/web/stop", headers=key))
    await wait_for_state(client, "web", "stopping")
    again = asyncio.create_task(client.post(f"{VMS}/web/stop", headers=key))
    over.set()
    assert (await again).content == (await lost).content


async def test_too_large_a_body_is_still_too_large(client: Client) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b" " * 1024 * 1024

    reply = await client.post(VMS, content=chunks(), headers=with_key())
    assert (reply.status_code, reply.json()["code"]) == (413, "too_large")
    reply = await client.post(VMS, content=b"{", headers=with_key())
    assert (reply.status_code, reply.json()["code"]) == (400, "invalid_body")


async def test_answers_survive_the_server_and_are_private(engine: LocalEngine, home: Home) -> None:
    key = with_key("a-key-of-mine")
    async with connect(build_app(engine)) as client:
        first = await client.post(VMS, json=WEB, headers=key)
        await wait_for_state(client, "web", "stopped")
    await engine.close()
    (kept,) = home.answers.iterdir()
    assert kept.stat().st_mode & 0o777 == 0o600
    assert home.answers.stat().st_mode & 0o777 == 0o700
    driver = FakeDriver()
    async with start_fake_engine(home, driver) as second, connect(build_app(second)) as client:
        again = await client.post(VMS, json=WEB, headers=key)
        assert (again.status_code, again.content) == (202, first.content)
    end_machines(driver)


async def test_a_request_that_was_cut_off_is_carried_out_again(
    client: Client, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()

    async def hang(*_: object) -> None:
        asked.set()
        await asyncio.Event().wait()

    key = with_key()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "create_vm", hang)
        cut = asyncio.create_task(client.post(VMS, json=WEB, headers=key))
        await asked.wait()
        cut.cancel()
        await asyncio.wait({cut})
    # As if it had been done, and the server killed before its answer was.
    await create(client, "web")
    again = await client.post(VMS, json=WEB, headers=key)
    assert (again.status_code, again.json()["code"]) == (409, "already_exists")
    assert "may have been carried out" in again.json()["hint"]
    await client.delete(f"{VMS}/web")
    assert (await client.post(VMS, json=WEB, headers=key)).status_code == 202


async def test_an_answer_does_not_cross_to_a_listener_of_another_shape(
    engine: LocalEngine,
) -> None:
    app, key = build_app(engine), with_key()
    async with connect(app) as client, connect(app, Rules(compat=True)) as compat:
        assert (await client.post(VMS, json=WEB, headers=key)).status_code == 202
        reply = await compat.post(VMS, json=WEB, headers=key)
        assert (reply.status_code, reply.json()["code"]) == (422, "key_reused")
