"""The guest agent's client against a real qemu-ga on this host, and against agents that fail."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from lumed.errors import MachineFailed, OutcomeUnknown, TimedOut
from lumed.guest import agent as module
from lumed.guest.agent import GuestAgent
from tests.doubles.talkers import Talk, talk_at_path

needs_qemu_ga = pytest.mark.skipif(
    shutil.which("qemu-ga", path="/usr/sbin:/usr/bin") is None,
    reason="needs the package qemu-guest-agent",
)


def is_listening(path: Path) -> bool:
    """proc(5), /proc/net/unix: a listening socket has the flag SO_ACCEPTCON."""
    for line in Path("/proc/net/unix").read_text().splitlines():
        words = line.split()
        if words[-1] == os.fspath(path) and words[3] == "00010000":
            return True
    return False


@pytest.fixture
def real_agent(tmp_path: Path) -> Iterator[Path]:
    """The socket of a qemu-ga that answers for this host and cannot power it off."""
    path = tmp_path / "agent.sock"
    process = subprocess.Popen(
        [
            *("qemu-ga", "--method", "unix-listen", "--path", path, "--statedir", tmp_path),
            *("--blacklist", "guest-shutdown,guest-suspend-disk,guest-suspend-ram"),
        ],
        env=os.environ | {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 10
        while not is_listening(path):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield path
    finally:
        process.kill()
        process.wait(10)


@pytest.fixture
async def agent(real_agent: Path) -> AsyncIterator[GuestAgent]:
    """A GuestAgent of the real one."""
    with contextlib.closing(GuestAgent(real_agent)) as agent:
        yield agent


@contextlib.asynccontextmanager
async def an_agent_that(talk: Talk, path: Path) -> AsyncIterator[GuestAgent]:
    """A GuestAgent whose other end is `talk`."""
    async with talk_at_path(talk, path):
        with contextlib.closing(GuestAgent(path)) as agent:
            yield agent


async def answer_sync(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one guest-sync-delimited as qemu-ga does."""
    request = json.loads((await reader.readline()).lstrip(b"\xff"))
    assert request["execute"] == "guest-sync-delimited"
    writer.write(b"\xff" + json.dumps({"return": request["arguments"]["id"]}).encode() + b"\n")


@needs_qemu_ga
async def test_it_tells_the_system_and_the_addresses(agent: GuestAgent) -> None:
    await agent.ping(5)
    info = await agent.os_info(5)
    assert info.kernel == os.uname().release
    assert info.id
    cards = {card.name: card for card in await agent.network_addresses(5)}
    assert cards["lo"].mac is None
    assert "127.0.0.1" in cards["lo"].addresses


@needs_qemu_ga
async def test_a_command_gets_its_input_and_its_outputs_come_back(agent: GuestAgent) -> None:
    result = await agent.exec(
        ["/bin/sh", "-c", "cat; echo oops >&2; exit 3"], stdin=b"a\0b", timeout_s=10
    )
    assert (result.exit_status, result.signal) == (3, None)
    assert (result.stdout, result.stderr) == (b"a\0b", b"oops\n")
    assert not result.truncated
    killed = await agent.exec(["/bin/sh", "-c", "kill -9 $$"], timeout_s=10)
    assert (killed.exit_status, killed.signal) == (None, 9)


@needs_qemu_ga
async def test_a_command_that_goes_on_is_an_unknown_outcome_with_its_pid(agent: GuestAgent) -> None:
    with pytest.raises(OutcomeUnknown) as caught:
        await agent.exec(["/bin/sleep", "60"], timeout_s=0.3)
    pid = caught.value.fields["pid"]
    assert isinstance(pid, int)
    os.kill(pid, signal.SIGKILL)


@needs_qemu_ga
async def test_what_the_agent_refuses_is_said_in_its_words(agent: GuestAgent) -> None:
    with pytest.raises(MachineFailed, match="guest-shutdown"):
        await agent.shutdown(5)
    with pytest.raises(MachineFailed, match="No such file"):
        await agent.exec(["/no/such/program"], timeout_s=5)


@needs_qemu_ga
async def test_calls_at_once_take_turns(agent: GuestAgent) -> None:
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(agent.ping(10))


@needs_qemu_ga
async def test_what_a_former_client_left_behind_confuses_nobody(real_agent: Path) -> None:
    with socket.socket(socket.AF_UNIX) as rude:
        rude.connect(os.fspath(real_agent))
        rude.sendall(b'{"execute": "guest-info"}\n{"execute": "guest-in')
    deadline = time.monotonic() + 10
    with contextlib.closing(GuestAgent(real_agent)) as agent:
        while True:
            try:
                await agent.ping(5)
                break
            except MachineFailed:  # between two clients qemu-ga does not listen, as QEMU would
                assert time.monotonic() < deadline


async def test_answers_of_a_former_client_are_skipped(tmp_path: Path) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'tail of a line"}}\n{"return": {"stale": 1}}\n\xff{"return": 7}\n')
        await answer_sync(reader, writer)
        await reader.readline()
        writer.write(b'{"return": {}}\n')

    async with an_agent_that(talk, tmp_path / "a.sock") as agent:
        await agent.ping(5)


@pytest.mark.parametrize("timeout_s", [0.05, 60])
async def test_an_answer_that_nobody_waits_for_any_more_is_still_taken(
    tmp_path: Path, timeout_s: float
) -> None:
    """qemu-ga would try to write it for ever, with all of its guest's processor."""
    asked, taken = asyncio.Event(), asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer_sync(reader, writer)
        await reader.readline()
        asked.set()
        await asyncio.sleep(0.1)
        # More than the connection holds: it comes to an end only if somebody reads it.
        writer.write(b" " * 8_000_000 + b"{}\n")
        await writer.drain()
        taken.set()

    async with an_agent_that(talk, tmp_path / "a.sock") as agent, asyncio.timeout(10):
        asking = asyncio.create_task(agent.network_addresses(timeout_s))
        await asked.wait()
        if timeout_s > 1:
            asking.cancel()
        with pytest.raises((TimedOut, asyncio.CancelledError)):
            await asking
        await taken.wait()


@pytest.fixture
def lonely_channel(tmp_path: Path) -> Iterator[Path]:
    """The agent's socket of a real QEMU in whose guest no program opened the port."""
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen(1)
        process = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-accel", "tcg", "-nodefaults", "-display", "none"),
                *("-m", "32M", "-chardev"),
                f"socket,id=a,fd={listener.fileno()},server=on,wait=off",
                *("-device", "virtio-serial-pci"),
                *("-device", "virtserialport,chardev=a,name=org.qemu.guest_agent.0"),
            ],
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
        )
    try:
        yield path
    finally:
        process.kill()
        process.wait(10)


async def test_a_machine_without_an_agent_in_it_is_a_timeout(lonely_channel: Path) -> None:
    began = time.monotonic()
    with contextlib.closing(GuestAgent(lonely_channel)) as agent:
        for _ in range(2):
            with pytest.raises(TimedOut, match=r"did not answer within 0\.3 s"):
                await agent.ping(0.3)
    assert time.monotonic() - began < 5


async def test_a_machine_that_is_gone_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(MachineFailed):
        await GuestAgent(tmp_path / "none.sock").ping(1)


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (lambda agent: agent.network_addresses(0.2), TimedOut),
        (lambda agent: agent.exec(["/bin/true"], timeout_s=0.2), OutcomeUnknown),
        (lambda agent: agent.shutdown(0.2), OutcomeUnknown),
    ],
)
async def test_a_question_without_an_answer_timed_out_but_a_change_is_unknown(
    tmp_path: Path, ask: Callable[[GuestAgent], Awaitable[object]], error: type[Exception]
) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer_sync(reader, writer)
        await reader.read()

    async with an_agent_that(talk, tmp_path / "a.sock") as agent:
        with pytest.raises(error):
            await ask(agent)


async def test_a_call_that_timed_out_does_not_disturb_the_next(tmp_path: Path) -> None:
    connections = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await answer_sync(reader, writer)
        await reader.readline()
        await asyncio.sleep(0.3)
        writer.write(b'{"return": {"too": "late"}}\n')
        await answer_sync(reader, writer)
        await reader.readline()
        writer.write(b'{"return": []}\n')
        await reader.read()

    async with an_agent_that(talk, tmp_path / "a.sock") as agent:
        with pytest.raises(TimedOut):
            await agent.network_addresses(0.1)
        assert await agent.network_addresses(5) == []
    assert connections == 1


async def test_a_guest_that_talks_without_end_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LONGEST_ANSWER", 1 << 20)
    is_left = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer_sync(reader, writer)
        await reader.readline()
        writer.write(b'{"return": {}}\n')
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b" " * 100_000)
                await writer.drain()
        is_left.set()

    async with an_agent_that(talk, tmp_path / "a.sock") as agent, asyncio.timeout(10):
        await agent.ping(5)
        await is_left.wait()


async def test_a_connection_that_breaks_after_a_change_is_unknown(tmp_path: Path) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer_sync(reader, writer)
        await reader.readline()
        writer.close()

    async with an_agent_that(talk, tmp_path / "a.sock") as agent:
        with pytest.raises(OutcomeUnknown, match="the connection ended"):
            await agent.exec(["/bin/true"], timeout_s=5)
        with pytest.raises(MachineFailed):
            await agent.ping(5)


async def test_an_agent_that_goes_away_at_the_power_off_took_the_order(tmp_path: Path) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer_sync(reader, writer)
        assert json.loads(await reader.readline())["arguments"] == {"mode": "powerdown"}
        writer.close()

    async with an_agent_that(talk, tmp_path / "a.sock") as agent:
        await agent.shutdown(5)


@pytest.mark.parametrize(
    "answer",
    [
        b'{"return": 5}\n',
        b'{"return": [5]}\n',
        b'{"return": [{"name": 1, "ip-addresses": 7}]}\n',
        b'{"return": [{"name": 1, "ip-addresses": ["x"]}]}\n',
        b"[]\n",
        b"{}\n",
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
        b'{"error": "no"}\n',
        b'{"error": {"desc": "no"}}\n',
    ],
)
async def test_nonsense_out_of_the_guest_is_a_failure_and_nothing_worse(
    answer: bytes, tmp_path: Path
) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer_sync(reader, writer)
        await reader.readline()
        writer.write(answer)
        await reader.read()

    async with an_agent_that(talk, tmp_path / "a.sock") as agent:
        with pytest.raises(MachineFailed):
            await agent.network_addresses(5)


async def test_addresses_that_are_none_are_left_out(tmp_path: Path) -> None:
    cards = [
        {
            "name": "eth0",
            "hardware-address": "52:54:00:AB:CD:EF",
            "ip-addresses": [
                {"ip-address": "10.0.2.15", "ip-address-type": "ipv4", "prefix": 24},
                {"ip-address": "'; DROP TABLE vms", "ip-address-type": "ipv4"},
                {"ip-address": 5},
            ],
        }
    ]

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer_sync(reader, writer)
        await reader.readline()
        writer.write(json.dumps({"return": cards}).encode() + b"\n")

    async with an_agent_that(talk, tmp_path / "a.sock") as agent:
        (card,) = await agent.network_addresses(5)
    assert card.mac == "52:54:00:ab:cd:ef"
    assert card.addresses == ("10.0.2.15",)
