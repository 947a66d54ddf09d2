"""A driver whose machines are `sleep` processes: it passes the same contract as QEMU's.

The process is real, so locks, pidfds and adoption are the kernel's own.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

from lumed.errors import MachineFailed
from lumed.machine.driver import AgentOpened, GuestShutDown, MachineEvent, MachineStatus
from lumed.machine.spec import MachineSpec
from lumed.model.vm import Architecture, Firmware
from lumed.osproc import Child, ProcessId, is_alive, send_signal, start_detached


class FakeDriver:
    """Starts `sleep` processes; `failure` makes the next start fail with these words."""

    def __init__(self) -> None:
        self.failure: str | None = None
        self.delay: asyncio.Event | None = None
        self.launching = asyncio.Event()
        self.launched: list[MachineSpec] = []
        self.machines: list[FakeMachine] = []

    async def check_ready(self, architecture: Architecture, firmware: Firmware) -> None:
        """Nothing is needed."""

    async def launch(self, spec: MachineSpec) -> FakeMachine:
        """Start a `sleep` that holds the lock."""
        self.launching.set()
        if self.delay is not None:
            await self.delay.wait()
        if self.failure is not None:
            raise MachineFailed(self.failure)
        await asyncio.to_thread(_prepare, spec)
        fds = () if spec.lock_fd is None else (spec.lock_fd,)
        child = await start_detached(["/bin/sleep", "600"], log=spec.log, pass_fds=fds)
        self.launched.append(spec)
        self.machines.append(FakeMachine(child.identity, child, spec.vnc_password))
        return self.machines[-1]

    async def adopt(
        self,
        process: ProcessId,
        runtime_dir: Path,
        uuid: str,
        vnc_password: str | None,
        timeout_s: float | None,
    ) -> FakeMachine:
        """Find the `sleep` again."""
        if not is_alive(process) or await asyncio.to_thread(_read_uuid, runtime_dir) != uuid:
            raise MachineFailed("no such machine")
        return FakeMachine(process, None, vnc_password)


class FakeMachine:
    """A `sleep` that heeds the power button, unless `deaf`.

    With `goes_down` set, its "guest" has an agent, which ends at the button, and ends with it.
    """

    def __init__(self, process: ProcessId, child: Child | None, vnc_password: str | None) -> None:
        self._process = process
        self._child = child
        self._vnc_password = vnc_password
        self._events: asyncio.Queue[MachineEvent | None] = asyncio.Queue()
        self.deaf = False
        self.goes_down: asyncio.Event | None = None
        self._going: asyncio.Task[None] | None = None

    def open_agent(self, goes_down: asyncio.Event) -> None:
        """Have a guest agent from now on; the event is the end of a shutdown."""
        self.goes_down = goes_down
        self._events.put_nowait(AgentOpened(True))

    @property
    def process(self) -> ProcessId:
        """The `sleep`."""
        return self._process

    @property
    def exit_status(self) -> asyncio.Future[int] | None:
        """Known for our own children."""
        return self._child.exit_status if self._child else None

    @property
    def agent_socket(self) -> Path | None:
        """No guest, no agent."""
        return None

    async def query_agent_open(self, timeout_s: float) -> bool:
        """No guest, no agent."""
        return False

    async def query_status(self, timeout_s: float) -> MachineStatus:
        """Alive or gone."""
        if not is_alive(self._process):
            raise MachineFailed("the machine is gone")
        return MachineStatus.RUNNING

    async def events(self) -> AsyncIterator[MachineEvent]:
        """What the methods below cause."""
        while (event := await self._events.get()) is not None:
            yield event

    async def resume(self, timeout_s: float) -> None:
        """Never paused."""

    async def press_power_button(self, timeout_s: float) -> None:
        """The "guest" shuts down."""
        await self.query_status(timeout_s)
        if self.goes_down is not None:
            self._events.put_nowait(AgentOpened(False))
            self._going = self._going or asyncio.create_task(self._go_down(self.goes_down))
        elif not self.deaf:
            self._end(GuestShutDown(by_guest=True, reason="guest-shutdown"))

    async def _go_down(self, over: asyncio.Event) -> None:
        await over.wait()
        self._end(GuestShutDown(by_guest=True, reason="guest-shutdown"))

    async def quit(self, timeout_s: float) -> None:
        """The machine ends."""
        await self.query_status(timeout_s)
        self._end(GuestShutDown(by_guest=False, reason="host-qmp-quit"))

    async def query_vnc_port(self, timeout_s: float) -> int | None:
        """A port that nobody listens on."""
        return None if self._vnc_password is None else 5999

    async def screenshot(self, target: Path, timeout_s: float) -> None:
        """There is no screen."""
        raise MachineFailed("a fake machine has no screen")

    async def close(self) -> None:
        """Let go."""
        self._events.put_nowait(None)

    @property
    def is_alive(self) -> bool:
        """Whether the `sleep` runs."""
        return is_alive(self._process)

    def crash(self) -> None:
        """Die without a word; the connection breaks with it."""
        self._events.put_nowait(None)
        send_signal(self._process, signal.SIGKILL)

    def _end(self, event: MachineEvent) -> None:
        self._events.put_nowait(event)
        self._events.put_nowait(None)
        send_signal(self._process, signal.SIGKILL)


def _prepare(spec: MachineSpec) -> None:
    if not spec.disk.exists():
        raise MachineFailed(f"no such disk: {spec.disk}")
    spec.runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    (spec.runtime_dir / "uuid").write_text(spec.uuid)
    spec.serial_log.write_text("fake machine\n")


def _read_uuid(runtime_dir: Path) -> str:
    return (runtime_dir / "uuid").read_text()
