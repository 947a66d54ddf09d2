"""The connection to QEMU's monitor, where QEMU itself does odd things."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lumed.errors import MachineFailed
from lumed.machine.qemu.monitor import Monitor
from tests.doubles.talkers import Talk, talk_at_path

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}}, "capabilities": []}}
EVENT = {"event": "RESET", "data": {}, "timestamp": {"seconds": 1, "microseconds": 0}}


def talk_that_greets(is_greeting: Callable[[int], bool], calls: list[int]) -> Talk:
    """A monitor that begins with an event instead, as told by the number of the call."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        calls.append(len(calls))
        first = GREETING if is_greeting(calls[-1]) else EVENT
        writer.write(json.dumps(first).encode() + b"\r\n")
        while text := await reader.read(10_000):  # a request has no end of line
            request = json.loads(text)
            answer = {"return": {}} | {key: request[key] for key in ("id",) if key in request}
            writer.write(json.dumps(answer).encode() + b"\r\n")

    return talk


async def test_an_event_before_the_greeting_is_no_refusal(tmp_path: Path) -> None:
    calls: list[int] = []
    talk = talk_that_greets(lambda number: number > 0, calls)
    async with talk_at_path(talk, tmp_path / "qmp.sock"):
        monitor = await Monitor.connect(tmp_path / "qmp.sock", 5)
        assert await monitor.execute("query-status", timeout_s=5) == {}
        await monitor.close()
    assert calls == [0, 1]


async def test_what_never_greets_is_no_monitor(tmp_path: Path) -> None:
    calls: list[int] = []
    async with talk_at_path(talk_that_greets(lambda _: False, calls), tmp_path / "qmp.sock"):
        with pytest.raises(MachineFailed, match="Did not understand Greeting"):
            await Monitor.connect(tmp_path / "qmp.sock", 5)
    assert calls == [0, 1, 2]
