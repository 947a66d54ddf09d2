"""What lumed asks of a hypervisor: start a machine, find it again, talk to it, end it.

Another hypervisor is another package beside `qemu/` that passes `tests/contract/`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from lumed.machine.spec import MachineSpec
from lumed.model.vm import Architecture, Firmware
from lumed.osproc import ProcessId


class MachineStatus(StrEnum):
    """What a machine says of itself."""

    RUNNING = "running"
    PAUSED = "paused"


@dataclass(frozen=True, slots=True)
class AgentOpened:
    """The guest agent opened (or closed) its end of the channel."""

    is_open: bool


@dataclass(frozen=True, slots=True)
class GuestShutDown:
    """The machine is about to end; by_guest if the guest itself powered off."""

    by_guest: bool
    reason: str


@dataclass(frozen=True, slots=True)
class GuestReset:
    """The guest restarts; whatever was known of its readiness is void."""


@dataclass(frozen=True, slots=True)
class StatusChanged:
    """The machine was paused or resumed."""

    status: MachineStatus


@dataclass(frozen=True, slots=True)
class DiskError:
    """The machine could not write to its disk and was paused for it."""

    no_space: bool


MachineEvent = AgentOpened | GuestShutDown | GuestReset | StatusChanged | DiskError


class Machine(Protocol):
    """A running machine. It belongs to nobody: closing this object leaves it running."""

    @property
    def process(self) -> ProcessId:
        """The process whose end is the machine's end."""

    @property
    def exit_status(self) -> asyncio.Future[int] | None:
        """Its exit status; None if it is no child of this server."""

    @property
    def agent_socket(self) -> Path | None:
        """The host's end of the guest agent's channel; None if it has none."""

    async def query_agent_open(self, timeout_s: float) -> bool:
        """Whether a program in the guest has that channel open."""

    async def query_status(self, timeout_s: float) -> MachineStatus:
        """Ask the machine. Raises TimedOut if it is silent, MachineFailed if it is gone."""

    def events(self) -> AsyncIterator[MachineEvent]:
        """What happens to it from now on; ends when the connection is lost."""

    async def resume(self, timeout_s: float) -> None:
        """Let a paused machine go on."""

    async def press_power_button(self, timeout_s: float) -> None:
        """Ask the guest's system to shut down (ACPI). Raises as query_status does."""

    async def quit(self, timeout_s: float) -> None:
        """End the machine at once, disks flushed; returns when it has taken the command."""

    async def query_vnc_port(self, timeout_s: float) -> int | None:
        """The TCP port of its screen on 127.0.0.1; None without VNC."""

    async def screenshot(self, target: Path, timeout_s: float) -> None:
        """Write its screen to target as PNG."""

    async def close(self) -> None:
        """Let go of the connections."""


class MachineDriver(Protocol):
    """Starts machines and finds them again."""

    async def check_ready(self, architecture: Architecture, firmware: Firmware) -> None:
        """Raise MissingDependency, with the line that mends it, if no such machine could start.

        Raises InvalidField (`fields["firmware"]`) for a firmware that this architecture has not.
        """

    async def launch(self, spec: MachineSpec) -> Machine:
        """Start a machine; returns once its monitor has answered.

        Raises MachineFailed with its last words, MissingDependency, or TimedOut; then no
        process of it is left.
        """

    async def adopt(
        self,
        process: ProcessId,
        runtime_dir: Path,
        uuid: str,
        vnc_password: str | None,
        timeout_s: float | None,
    ) -> Machine:
        """Take up a machine that another server started.

        Raises TimedOut if it is silent for timeout_s (None waits until it speaks), MachineFailed
        if it is gone or is another VM's.
        """
