"""A machine that runs: what is known of it in memory, and the watch over it until its end.

All of it can be had again from disk and kernel; `adopt.py` does so.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from lumed.claim import wait_unlocked
from lumed.errors import LumedError, TimedOut
from lumed.guest.agent import GuestAgent
from lumed.guest.ready import Evidence, Ready, ssh_banner, wait_ready
from lumed.log import EventLog
from lumed.machine.driver import (
    AgentOpened,
    DiskError,
    GuestReset,
    GuestShutDown,
    Machine,
    MachineStatus,
    StatusChanged,
)
from lumed.model.end import EndCause, MachineEnd
from lumed.model.vm import VmState
from lumed.osproc import ProcessId, read_last_words, wait_gone
from lumed.service.operations import utc_now
from lumed.store.runrecord import RunRecord, write_end_record, write_run_record
from lumed.store.vmdir import VmDir

_log = EventLog("machine")

_HEALTHY_FOR_S = 1.0
_SILENT_AFTER_S = 2.0
_DRAIN_S = 1.0
# Within a look. A busy guest in software emulation takes longer.
_SSH_ANSWERS_IN_S = 0.3
# After the first sign of the guest; one without an SSH server must not be asked for ever.
_SSH_COMES_WITHIN_S = 120.0
# A machine that was paused by a full disk goes on once so much is free again.
_RESUME_ABOVE_BYTES = 32 * 1024 * 1024


def _nobody_asks() -> None:
    pass


@dataclass(slots=True, eq=False)
class LiveMachine:
    """One running (or starting, or ending) machine.

    machine is None while it starts, and for one that was silent when it was adopted. on_change
    is called when its state, or what else one sees of it, may have changed.
    """

    vm_dir: VmDir
    record: RunRecord
    process: ProcessId | None = None
    machine: Machine | None = None
    agent: GuestAgent | None = None
    paused: bool = False
    silent: bool = False
    disk_full: bool = False
    readiness: Ready | None = None
    ssh_available: bool = False
    shut_down: GuestShutDown | None = None
    stop_step: str | None = None
    agent_open: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    end: MachineEnd | None = None
    on_change: Callable[[], None] = _nobody_asks
    _checked_at: float = 0.0
    _check: asyncio.Task[None] | None = None
    _ready_task: asyncio.Task[None] | None = None
    _events_task: asyncio.Task[None] | None = None

    @property
    def state(self) -> VmState:
        """The state word, from what is known now."""
        if self.silent:
            return VmState.UNRESPONSIVE
        if self.record.stop_requested:
            return VmState.STOPPING
        if self.machine is None:
            return VmState.STARTING
        return VmState.PAUSED if self.paused else VmState.RUNNING

    @property
    def problems(self) -> tuple[str, ...]:
        """What the user should know of this run."""
        if self.disk_full:
            where = self.vm_dir.path.parent
            return (*self.record.problems, f"paused: no space is left in {where}")
        return self.record.problems

    async def save(self, **changes: object) -> None:
        """Replace facts of the run record, on disk first."""
        record = replace(self.record, **changes)  # type: ignore[arg-type]
        await asyncio.to_thread(write_run_record, self.vm_dir.run_record, record)
        self.record = record
        self.on_change()

    async def check(self) -> None:
        """Ask the machine how it is, unless it answered within the last second.

        Returns after 2 s at the latest; a machine that is silent by then shows as such, and the
        question stays open until it answers.
        """
        if self.machine is None or time.monotonic() - self._checked_at < _HEALTHY_FOR_S:
            return
        if self._check is None or self._check.done():
            self._check = asyncio.create_task(self._ask(self.machine))
        if not self.silent:
            await asyncio.wait({self._check}, timeout=_SILENT_AFTER_S)

    async def _ask(self, machine: Machine) -> None:
        before = (self.silent, self.paused, self.ssh_available)
        try:
            status = await machine.query_status(_SILENT_AFTER_S * 0.9)
            if self.disk_full and status is MachineStatus.PAUSED:
                free = await asyncio.to_thread(shutil.disk_usage, self.vm_dir.path)
                if free.free > _RESUME_ABOVE_BYTES:
                    await machine.resume(_SILENT_AFTER_S)
        except LumedError as error:
            if not isinstance(error, TimedOut):
                # A closed connection is mostly the first sign of a machine's end, not silence.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_SILENT_AFTER_S):
                        await self.ended.wait()
            if not self.silent and not self.ended.is_set():
                _log.warning("machine silent", vm=self.vm_dir.name, error=error)
            self.silent = not self.ended.is_set()
        else:
            self.silent = False
            self.paused = status is MachineStatus.PAUSED
            await self._look_for_ssh()
        self._checked_at = time.monotonic()
        if before != (self.silent, self.paused, self.ssh_available):
            self.on_change()

    async def _look_for_ssh(self) -> None:
        place = self._ssh_place()
        if place is not None and not self.ssh_available:
            self.ssh_available = await ssh_banner(*place, _SSH_ANSWERS_IN_S)

    @property
    def ip_address(self) -> str | None:
        """Where clients reach the guest, once it really answers there."""
        if self.readiness is None:
            return None
        return self.record.address or self.readiness.address

    def attach(self, machine: Machine) -> None:
        """Take up the connection to the machine and listen to it."""
        if self.ended.is_set():
            return
        self.machine = machine
        if machine.agent_socket is not None:
            self.agent = GuestAgent(machine.agent_socket)
        self.process = machine.process
        self.silent = False
        self._events_task = asyncio.create_task(self._follow_events(machine))
        self._watch_readiness()
        self.on_change()

    async def watch(self, on_end: Callable[[LiveMachine], None]) -> None:
        """Follow the process to its end and record that end. Runs as a task of the engine."""
        if self.process is None:
            raise ValueError("a machine without a process cannot be watched")
        try:
            await wait_gone(self.process, None)
        finally:
            self.stop_asking()
        if self._events_task is not None:
            # The last events are still on their way through the connection.
            await asyncio.wait({self._events_task}, timeout=_DRAIN_S)
        status = await self._exit_status()
        await self.let_go()
        # Whoever sees it stopped may run it at once.
        with contextlib.suppress(OSError):
            await wait_unlocked(self.vm_dir.run_lock, _DRAIN_S)
        words = await asyncio.to_thread(read_last_words, self.vm_dir.qemu_log)
        self.end = conclude(self, status, words)
        await self.record_end()
        # Once more, for a connection that was taken up while the machine was ending.
        await self.let_go()
        on_end(self)

    async def record_end(self) -> None:
        """Write how it ended and forget how to reach it."""
        end = self.end
        if end is None:
            raise ValueError("the machine has not ended")
        facts = {"vm": self.vm_dir.name, "cause": end.cause.value, "detail": end.detail}
        (_log.warning if end.is_failure else _log.info)("machine ended", **facts)
        try:
            await asyncio.to_thread(_write_end, self.vm_dir, Path(self.record.runtime_dir), end)
        except (OSError, LumedError) as error:
            # The folder may be gone by hand, or the disk full: the next server concludes again.
            _log.warning("end not recorded", vm=self.vm_dir.name, error=error)
        self.ended.set()

    async def _follow_events(self, machine: Machine) -> None:
        async for event in machine.events():
            match event:
                case AgentOpened(is_open=True):
                    self.agent_open.set()
                case AgentOpened():
                    self.agent_open.clear()
                case GuestShutDown():
                    self.shut_down = event
                case GuestReset():
                    # Whatever answered before is gone until the guest is up again.
                    self.readiness = None
                    self.ssh_available = False
                    self._watch_readiness()
                case StatusChanged():
                    self.paused = event.status is MachineStatus.PAUSED
                    self.disk_full = self.disk_full and self.paused
                case DiskError():
                    self.disk_full = event.no_space
                    _log.warning("disk error", vm=self.vm_dir.name, no_space=event.no_space)
            self.on_change()

    def _watch_readiness(self) -> None:
        if self._ready_task is not None:
            self._ready_task.cancel()
        self._ready_task = asyncio.create_task(self._wait_ready())

    async def _wait_ready(self) -> None:
        if self.machine is None:
            return
        ssh, answer = self._forward_of(22), self._forward_of(8000)
        if self.agent is None and ssh is None and answer is None:
            return
        if await self.machine.query_agent_open(_SILENT_AFTER_S):
            self.agent_open.set()
        self.readiness = await wait_ready(
            mac=self.record.mac_address,
            agent=self.agent,
            agent_open=self.agent_open,
            ssh=ssh,
            answer=answer,
        )
        self.on_change()
        _log.info("guest ready", vm=self.vm_dir.name, evidence=self.readiness.evidence.value)
        await self._wait_ssh(self.readiness)

    async def _wait_ssh(self, readiness: Ready) -> None:
        """See to it that who watches is told of SSH; looks at the VM find it later, too."""
        place = self._ssh_place()
        if place is None:
            return
        if readiness.evidence is not Evidence.SSH:
            try:
                await wait_ready(
                    mac=self.record.mac_address, ssh=place, timeout_s=_SSH_COMES_WITHIN_S
                )
            except TimedOut:
                return
        self.ssh_available = True
        self.on_change()

    def _ssh_place(self) -> tuple[str, int] | None:
        if self.ip_address is None:
            return None
        return self._forward_of(22) or (self.ip_address, 22)

    def _forward_of(self, guest_port: int) -> tuple[str, int] | None:
        forwards = (f for f in self.record.forwards if f.guest_port == guest_port)
        found = next(forwards, None)
        return None if found is None else (found.address, found.port)

    def stop_asking(self) -> None:
        """Ask the guest nothing more: its agent hears one caller at a time."""
        for task in (self._ready_task, self._check):
            if task is not None:
                task.cancel()

    async def _exit_status(self) -> int | None:
        status = self.machine.exit_status if self.machine else None
        if status is None:
            return None
        await asyncio.wait({status}, timeout=_DRAIN_S)
        return status.result() if status.done() else None

    async def let_go(self) -> None:
        """Drop the connections and leave the machine to itself."""
        self.stop_asking()
        if self._events_task is not None:
            self._events_task.cancel()
        if self.agent is not None:
            self.agent.close()
        if self.machine is not None:
            await self.machine.close()


def conclude(live: LiveMachine, status: int | None, words: str) -> MachineEnd:
    """Why the machine ended, from everything that is known. status is None if nobody saw it."""

    def end(cause: EndCause, detail: str) -> MachineEnd:
        return MachineEnd(cause, detail, utc_now(), live.stop_step)

    told = live.shut_down
    if live.record.stop_requested:
        return end(EndCause.STOPPED, "stopped on request")
    if told is not None and told.by_guest:
        return end(EndCause.GUEST, "the guest shut itself down")
    if status is not None and status < 0:
        return end(EndCause.CRASHED, f"QEMU was killed by signal {-status}")
    if told is not None and told.reason == "host-qmp-quit":
        return end(EndCause.STOPPED, "its machine was told to quit")
    if told is not None or "terminating on signal" in words:
        return end(EndCause.CRASHED, "QEMU was ended by a signal from outside lumed")
    if status:
        return end(EndCause.CRASHED, f"QEMU failed with status {status}: {words or 'no message'}")
    if status == 0:
        return end(EndCause.CRASHED, "QEMU ended by itself without a reason")
    return end(EndCause.UNKNOWN, "it ended while no server was watching")


def _write_end(vm_dir: VmDir, runtime_dir: Path, end: MachineEnd) -> None:
    shutil.rmtree(runtime_dir, ignore_errors=True)
    try:
        write_end_record(vm_dir.end_record, end)
    finally:
        with contextlib.suppress(OSError):
            vm_dir.run_record.unlink(missing_ok=True)
