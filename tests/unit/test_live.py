"""A machine that runs: what shows of it by itself, without anybody who asks."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from lumed.model.run import Forward, RunOptions
from lumed.osproc import find_process
from lumed.service.live import LiveMachine
from lumed.store.runrecord import RunRecord
from lumed.store.vmdir import VmDir
from tests.doubles.fake_driver import FakeMachine
from tests.doubles.talkers import talk_at_port
from tests.unit.test_ready import say_ssh


async def test_a_guest_that_is_ready_shows_its_address_and_its_sshd(tmp_path: Path) -> None:
    process = find_process(os.getpid())
    assert process is not None
    seen: asyncio.Queue[tuple[str | None, bool]] = asyncio.Queue()
    async with talk_at_port(say_ssh) as (address, port):
        record = RunRecord(
            uuid="",
            runtime_dir=str(tmp_path),
            accelerator="tcg",
            network="nat",
            mac_address="52:54:00:00:00:01",
            options=RunOptions(),
            started_at="",
            address="127.77.0.1",
            forwards=(Forward(22, address, port),),
        )
        live = LiveMachine(VmDir(tmp_path), record)
        live.on_change = lambda: seen.put_nowait((live.ip_address, live.ssh_available))
        live.attach(FakeMachine(process, None, None))
        async with asyncio.timeout(10):
            assert await seen.get() == (None, False)
            assert await seen.get() == ("127.77.0.1", False)
            assert await seen.get() == ("127.77.0.1", True)
        await live.let_go()
