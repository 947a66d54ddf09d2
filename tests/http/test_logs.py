"""GET of logs: what is there, and what comes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI

from lumed.http.app import build_app
from lumed.log import EventLog, start_logging
from lumed.service.local import LocalEngine
from lumed.store.layout import Home
from tests.http.conftest import Client
from tests.http.reader import reading
from tests.http.test_vms import VMS, create, run

LOGS = f"{VMS}/web/logs"


@pytest.fixture
def app(engine: LocalEngine) -> FastAPI:
    return build_app(engine)


@pytest.fixture
async def folder(client: Client, home: Home) -> Path:
    await create(client, "web", image="tiny")
    return home.location("home") / "web"


async def test_a_vm_that_never_ran_has_empty_logs(client: Client, folder: Path) -> None:
    assert (await client.get(LOGS)).json() == {"serial": "", "qemu": ""}


async def test_logs_are_chosen_by_type_and_cut_to_their_last_lines(
    client: Client, folder: Path
) -> None:
    (folder / "serial.log").write_bytes(b"one\r\ntwo \x1b[1m\xff\r\n")
    (folder / "qemu.log").write_bytes(b"warning\n")
    both = (await client.get(LOGS, params={"type": "all"})).json()
    assert both == {"serial": "one\r\ntwo \x1b[1m\ufffd\r\n", "qemu": "warning\n"}
    reply = await client.get(LOGS, params={"type": "serial", "lines": 1})
    assert reply.json() == {"serial": "two \x1b[1m\ufffd\r\n"}
    reply = await client.get(LOGS, params={"type": "qemu", "storage": "home"})
    assert reply.json() == {"qemu": "warning\n"}


async def test_a_console_is_followed_through_runs_until_the_vm_is_deleted(
    app: FastAPI, client: Client, folder: Path
) -> None:
    async with reading(app, f"{LOGS}?follow=true") as reader:
        assert reader.headers["content-type"] == "text/plain; charset=utf-8"
        await run(client, "web", noDisplay=True)
        await reader.wait_for(lambda: reader.text == "fake machine\n")
        with (folder / "serial.log").open("a") as file:
            file.write("login: ")
        await reader.wait_for(lambda: reader.text == "fake machine\nlogin: ")
        await client.post(f"{VMS}/web/stop", json={"force": True})
        await run(client, "web", noDisplay=True)
        await reader.wait_for(lambda: reader.text.count("fake machine\n") == 2)
        assert not reader.is_over
        await client.delete(f"{VMS}/web")
        await reader.wait_for(lambda: reader.is_over)


async def test_a_follower_that_leaves_disturbs_nobody(app: FastAPI, folder: Path) -> None:
    (folder / "qemu.log").write_text("one\ntwo\n")
    async with (
        reading(app, f"{LOGS}?follow=true&type=qemu") as stays,
        reading(app, f"{LOGS}?follow=true&type=qemu&lines=1") as leaves,
    ):
        await leaves.wait_for(lambda: leaves.text == "two\n")
        await stays.wait_for(lambda: stays.text == "one\ntwo\n")


@pytest.fixture
def logs(home: Home) -> Iterator[None]:
    with start_logging(home.logs, "info"):
        yield


@pytest.mark.usefixtures("logs")
async def test_the_servers_log_is_followed(app: FastAPI) -> None:
    log = EventLog("test")
    async with (
        reading(app, "/lume/logs?follow=true&lines=1") as info,
        reading(app, "/lume/logs?follow=true&type=error") as error,
    ):
        log.info("counted")
        await info.wait_for(lambda: "counted" in info.text)
        log.warning("odd")
        await info.wait_for(lambda: "odd" in info.text)
        await error.wait_for(lambda: "odd" in error.text)
        assert "counted" not in error.text


async def test_all_logs_end_with_the_server(engine: LocalEngine, folder: Path) -> None:
    ending = asyncio.Event()
    async with reading(build_app(engine, ending=ending), f"{LOGS}?follow=true") as reader:
        ending.set()
        await reader.wait_for(lambda: reader.is_over)


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("type=secret", 422),
        ("lines=0", 422),
        ("follow=perhaps", 422),
        ("follow=true&type=all", 422),
        ("storage=floppy", 422),
        ("storage=ssd&follow=true", 404),
    ],
)
async def test_odd_wishes_are_refused(
    client: Client, folder: Path, query: str, status: int
) -> None:
    assert (await client.get(f"{LOGS}?{query}")).status_code == status


async def test_the_logs_of_no_vm_are_not_found(client: Client) -> None:
    for path in ("/nothing/logs", "/nothing/logs?follow=true", "/..%2f..%2fetc/logs"):
        assert (await client.get(VMS + path)).status_code == 404
