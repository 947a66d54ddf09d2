"""What counts as evidence that a guest can be reached, and what does not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lumed.errors import TimedOut
from lumed.guest.agent import GuestAgent
from lumed.guest.ready import Evidence, Ready, ssh_banner, wait_ready
from tests.doubles.talkers import Talk, talk_at_path, talk_at_port

MAC = "52:54:00:00:00:01"
HOST = "127.0.0.1"


async def stay_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Like a forwarded port behind which nothing listens: accepted, then nothing."""
    await reader.read()


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def say_ssh(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")


async def answer_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    if await reader.readline() == b"GET / HTTP/1.0\r\n":
        writer.write(b"h")


@contextlib.asynccontextmanager
async def an_agent_with(cards: list[dict[str, object]], path: Path) -> AsyncIterator[GuestAgent]:
    """An agent whose cards are `cards` at the moment it is asked."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sync = json.loads((await reader.readline()).lstrip(b"\xff"))
        writer.write(b"\xff" + json.dumps({"return": sync["arguments"]["id"]}).encode() + b"\n")
        await reader.readline()
        writer.write(json.dumps({"return": cards}).encode() + b"\n")

    async with talk_at_path(talk, path):
        with contextlib.closing(GuestAgent(path)) as agent:
            yield agent


def a_card(mac: str, *addresses: str) -> dict[str, object]:
    return {
        "name": "eth0",
        "hardware-address": mac,
        "ip-addresses": [{"ip-address": address} for address in addresses],
    }


async def test_an_ssh_banner_is_evidence() -> None:
    async with talk_at_port(say_ssh) as ssh, talk_at_port(stay_silent) as answer:
        assert await wait_ready(mac=MAC, ssh=ssh, answer=answer, timeout_s=5) == Ready(Evidence.SSH)


async def test_any_byte_from_the_http_port_is_evidence() -> None:
    async with talk_at_port(hang_up) as ssh, talk_at_port(answer_http) as answer:
        ready = await wait_ready(mac=MAC, ssh=ssh, answer=answer, timeout_s=5)
    assert ready == Ready(Evidence.ANSWER)


@pytest.mark.parametrize("talk", [stay_silent, hang_up])
async def test_a_port_that_only_accepts_is_none(talk: Talk) -> None:
    async with talk_at_port(talk) as port:
        with pytest.raises(TimedOut, match=r"within 0\.5 s"):
            await wait_ready(mac=MAC, ssh=port, answer=port, timeout_s=0.5)


async def test_another_greeting_on_the_ssh_port_is_none() -> None:
    async def say_ftp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 ftp ready\r\n")

    async with talk_at_port(say_ftp) as port:
        assert not await ssh_banner(*port, 1)
        assert not await ssh_banner(HOST, free_port(), 1)


async def test_the_agent_tells_the_address_of_the_card_with_our_mac(tmp_path: Path) -> None:
    cards = [
        a_card("52:54:00:00:00:99", "10.9.9.9"),
        a_card(MAC.upper(), "fe80::1", "169.254.3.3", "192.168.7.5"),
    ]
    async with an_agent_with(cards, tmp_path / "a.sock") as agent:
        ready = await wait_ready(mac=MAC, agent=agent, timeout_s=5)
    assert ready == Ready(Evidence.AGENT, "192.168.7.5")


async def test_an_agent_without_an_address_yet_is_asked_again(tmp_path: Path) -> None:
    cards = [a_card(MAC, "169.254.3.3")]
    async with an_agent_with(cards, tmp_path / "a.sock") as agent:
        waiting = asyncio.create_task(wait_ready(mac=MAC, agent=agent, timeout_s=10))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(waiting), 0.5)
        cards[:] = [a_card(MAC, "10.0.2.15")]
        assert await waiting == Ready(Evidence.AGENT, "10.0.2.15")


async def test_the_agent_is_not_asked_before_its_port_is_open(tmp_path: Path) -> None:
    is_open = asyncio.Event()
    async with an_agent_with([a_card(MAC, "10.0.2.15")], tmp_path / "a.sock") as agent:
        with pytest.raises(TimedOut):
            await wait_ready(mac=MAC, agent=agent, agent_open=is_open, timeout_s=0.5)
        is_open.set()
        ready = await wait_ready(mac=MAC, agent=agent, agent_open=is_open, timeout_s=5)
    assert ready.address == "10.0.2.15"


async def test_a_guest_that_comes_up_later_is_noticed() -> None:
    port = free_port()
    waiting = asyncio.create_task(wait_ready(mac=MAC, ssh=(HOST, port), timeout_s=10))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(waiting), 0.4)
    async with talk_at_port(say_ssh, port):
        assert (await waiting).evidence is Evidence.SSH


async def test_cancelling_leaves_no_task_behind() -> None:
    async with talk_at_port(stay_silent) as port:
        before = asyncio.all_tasks()
        waiting = asyncio.create_task(wait_ready(mac=MAC, ssh=port, answer=port))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert {task for task in asyncio.all_tasks() - before if "watch" in repr(task)} == set()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
