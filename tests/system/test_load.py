"""Many clients at once: random calls over 50 VMs, whose machines are real, without an end.

LUMED_LOAD_S seconds of it (60); the figure to reach is ten minutes.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lumed import AsyncClient
from lumed.client.models import Vm
from lumed.errors import Conflict, LumedError, NotFound
from tests.system.harness import Server, running_server

CLIENTS = 64
VMS = 50
# A client that asked before is answered by its deadline, also on a busy machine.
_LAST_ANSWER_S = 60
_SETTLED_S = 2.0


@dataclass
class Ledger:
    """What clients have asked for, so that a VM that stands still can be told from a lost one."""

    ends: Counter[str] = field(default_factory=Counter)
    ending: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Visitor:
    """One client, and what it does."""

    def __init__(self, client: AsyncClient, ledger: Ledger, image: Path, seed: int) -> None:
        self._client = client
        self._ledger = ledger
        self._image = str(image)
        self._random = random.Random(seed)  # noqa: S311

    async def visit(self, until: float) -> None:
        """Random calls until then. Only what a client can be told in such a crowd is suffered."""
        actions = (self._look, self._list, self._create, self._run, self._stop, self._change)
        weights = (8, 3, 3, 3, 3, 1)
        while time.monotonic() < until:
            (action,) = self._random.choices((*actions, self._delete), (*weights, 1))
            self._ledger.calls[action.__name__.strip("_")] += 1
            try:
                await action(f"vm{self._random.randrange(VMS)}")
            except (NotFound, Conflict) as error:
                self._ledger.refused[error.code] += 1
            except LumedError as error:
                self._ledger.wrong.append(f"{action.__name__}: {error.code}: {error}")

    async def _look(self, name: str) -> None:
        await self._client.get_vm(name)

    async def _list(self, _: str) -> None:
        await self._client.list_vms()
        await self._client.list_operations()

    async def _create(self, name: str) -> None:
        await self._client.create_vm(
            name, image=self._image, cpu=1, memory="64MB", disk_size="64MB", firmware="bios"
        )

    async def _run(self, name: str) -> None:
        ledger = self._ledger
        ends = ledger.ends[name]
        await self._client.run_vm(name, network="none", vnc="disabled")
        if ledger.ending[name] or ledger.ends[name] != ends:
            return
        vm = await self._client.get_vm(name)
        if ledger.ends[name] == ends and not vm.is_alive:
            ledger.wrong.append(f"{name} is {vm.state} after an accepted run: {vm.last_end}")

    async def _stop(self, name: str) -> None:
        await self._end(name, self._client.stop_vm(name, force=True))

    async def _change(self, name: str) -> None:
        await self._client.update_vm(name, cpu=self._random.choice((1, 2)))

    async def _delete(self, name: str) -> None:
        await self._end(name, self._client.delete_vm(name))

    async def _end(self, name: str, call: object) -> None:
        self._ledger.ends[name] += 1
        self._ledger.ending[name] += 1
        try:
            await call  # type: ignore[misc]
        finally:
            self._ledger.ending[name] -= 1


async def measure(pid: int) -> dict[str, int]:
    """What a process holds once it is over with what has ended, see read_held."""
    least, since = read_held(pid), time.monotonic()
    # On a busy machine it hears of the clients' 64 hang-ups some time after they have gone.
    while time.monotonic() - since < _SETTLED_S:
        await asyncio.sleep(0.1)
        held = read_held(pid)
        if held["descriptors"] < least["descriptors"]:
            least, since = held, time.monotonic()
    return least


def read_held(pid: int) -> dict[str, int]:
    """Descriptors, threads, and resident memory in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return {
        "descriptors": sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()),
        "threads": int(fields["Threads"]),
        "memory": int(fields["VmRSS"].split()[0]) // 1024,
    }


async def crowd(server: Server, image: Path, ledger: Ledger, seconds: float, seed: int) -> None:
    """All clients at once, for a while; no VM is left afterwards."""
    until = time.monotonic() + seconds
    clients = [AsyncClient(server.url) for _ in range(CLIENTS)]
    try:
        visitors = [
            Visitor(client, ledger, image, seed + index) for index, client in enumerate(clients)
        ]
        async with asyncio.timeout(seconds + _LAST_ANSWER_S):
            await asyncio.gather(*(visitor.visit(until) for visitor in visitors))
        for vm in await clients[0].list_vms():
            await clients[0].delete_vm(vm.name)
    finally:
        await asyncio.gather(*(client.close() for client in clients))


async def listen(server: Server, seen: list[Vm], ready: asyncio.Event) -> None:
    """Keep what is told of VMs."""
    async with AsyncClient(server.url) as client:
        async for event in client.events():
            ready.set()
            if event.vm is not None:
                seen.append(event.vm)


async def hold_up(server: Server, image: Path, seconds: float, seed: int) -> None:
    """The crowd, a watcher, and what the server holds before and after."""
    assert server.process is not None
    pid = server.process.pid
    await crowd(server, image, Ledger(), 5, seed)
    before = await measure(pid)
    ledger, ready = Ledger(), asyncio.Event()
    seen: list[Vm] = []
    watcher = asyncio.create_task(listen(server, seen, ready))
    await asyncio.wait_for(ready.wait(), 10)
    await crowd(server, image, ledger, seconds, seed + CLIENTS)
    watcher.cancel()
    await asyncio.gather(watcher, return_exceptions=True)
    after = await measure(pid)
    print(before, after, dict(ledger.calls), dict(ledger.refused), len(seen))
    assert not ledger.wrong, (len(ledger.wrong), ledger.wrong[:20])
    assert min(ledger.calls.values()) > 0
    states = {vm.state for vm in seen}
    assert {"provisioning", "stopped", "starting", "running"} <= states
    assert states <= {"provisioning", "stopped", "starting", "running", "stopping"}
    assert after["descriptors"] <= before["descriptors"] + 3
    assert after["threads"] <= before["threads"] + 2
    assert after["memory"] <= before["memory"] + 20


@pytest.mark.timeout(900)
def test_a_crowd_of_clients_is_served_without_a_fault(
    tmp_path: Path, image_cache: Path, alone: Callable[[], AbstractContextManager[None]]
) -> None:
    seconds = float(os.environ.get("LUMED_LOAD_S", "60"))
    seed = int(os.environ.get("LUMED_SEED", str(os.getpid())))
    print(f"LUMED_SEED={seed}")
    image = tmp_path / "empty.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "16M"], check=True)
    # Beside the kills, the clients' 64 connections were still open when the server was measured.
    with alone(), running_server(tmp_path / "home", image_cache) as server:
        asyncio.run(hold_up(server, image, seconds, seed))
