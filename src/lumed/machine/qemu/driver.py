"""QEMU as a MachineDriver."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, cast

from lumed.errors import InvalidField, LumedError, MachineFailed, OutcomeUnknown
from lumed.log import EventLog
from lumed.machine.driver import (
    AgentOpened,
    DiskError,
    GuestReset,
    GuestShutDown,
    MachineEvent,
    MachineStatus,
    StatusChanged,
)
from lumed.machine.qemu.accel import accel_args
from lumed.machine.qemu.argv import SocketFds, build_argv
from lumed.machine.qemu.firmware import find_uefi, make_vars
from lumed.machine.qemu.monitor import Monitor
from lumed.machine.spec import MachineSpec
from lumed.model.host import Accelerator
from lumed.model.vm import Architecture, Firmware
from lumed.osproc import (
    Child,
    ProcessId,
    read_last_words,
    send_signal,
    start_detached,
    wait_gone,
)

_log = EventLog("machine")

MONITOR, SECOND_MONITOR, AGENT, SERIAL = "qmp.sock", "qmp2.sock", "agent.sock", "serial.sock"
_START_TIMEOUT_S = 15.0
_COMMAND_TIMEOUT_S = 2.0


class QemuDriver:
    """Starts QEMU machines; qemu and accelerator are found when first needed."""

    def __init__(
        self,
        find_qemu: Callable[[Architecture], Path],
        find_accelerator: Callable[[Architecture], Awaitable[Accelerator]],
    ) -> None:
        self._find_qemu = find_qemu
        self._find_accelerator = find_accelerator

    async def check_ready(self, architecture: Architecture, firmware: Firmware) -> None:
        """See MachineDriver.check_ready."""
        if architecture is Architecture.ARM64 and firmware is Firmware.BIOS:
            reason = "arm64 guests boot by UEFI only"
            raise InvalidField(f"firmware: {reason}", fields={"firmware": reason})
        self._find_qemu(architecture)
        if firmware is Firmware.UEFI:
            find_uefi(architecture=architecture)
        await self._find_accelerator(architecture)

    async def launch(self, spec: MachineSpec) -> QemuMachine:
        """See MachineDriver.launch."""
        qemu = self._find_qemu(spec.architecture)
        accelerator = await self._find_accelerator(spec.architecture)
        uefi_code = None
        if spec.firmware is Firmware.UEFI and spec.uefi_vars is not None:
            uefi = find_uefi(architecture=spec.architecture)
            uefi_code = uefi.code
            if not spec.uefi_vars.exists():
                # A lost variable store costs its boot entries, not the VM.
                await make_vars(uefi.vars_template, spec.uefi_vars)
        spec.runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _listening(spec.runtime_dir) as fds:
            argv = build_argv(
                spec,
                qemu=qemu,
                accelerator=accel_args(accelerator, spec.architecture),
                uefi_code=uefi_code,
                sockets=fds,
            )
            _log.debug("qemu starts", vm=spec.name, argv=argv)
            pass_fds = [*fds.all(), *(() if spec.lock_fd is None else (spec.lock_fd,))]
            pass_fds += spec.network.pass_fds if spec.network else ()
            pass_fds += [fd for share in spec.shares for fd in share.pass_fds]
            child = await start_detached(argv, log=spec.log, pass_fds=pass_fds)
        try:
            monitor = await self._first_contact(child, spec)
            machine = QemuMachine(
                child.identity, child.exit_status, monitor, spec.runtime_dir / AGENT
            )
            await machine.set_vnc_password(spec.vnc_password)
        except BaseException:
            await _end_child(child)
            raise
        return machine

    async def adopt(
        self,
        process: ProcessId,
        runtime_dir: Path,
        uuid: str,
        vnc_password: str | None,
        timeout_s: float | None,
    ) -> QemuMachine:
        """See MachineDriver.adopt."""
        monitor = await Monitor.connect(runtime_dir / MONITOR, timeout_s)
        try:
            answer = await monitor.execute("query-uuid", timeout_s=_COMMAND_TIMEOUT_S)
            found = cast("dict[str, str]", answer)["UUID"]
            if found != uuid:
                raise MachineFailed(f"the machine at {runtime_dir} is {found}, not {uuid}")
            machine = QemuMachine(process, None, monitor, runtime_dir / AGENT)
            # The old server may have been killed before it had set the password.
            await machine.set_vnc_password(vnc_password)
        except BaseException:
            await monitor.close()
            raise
        return machine

    async def _first_contact(self, child: Child, spec: MachineSpec) -> Monitor:
        """The monitor, or the reason why QEMU ended before it answered."""
        connecting = asyncio.ensure_future(
            Monitor.connect(spec.runtime_dir / MONITOR, _START_TIMEOUT_S)
        )
        both: set[asyncio.Future[Any]] = {connecting, child.exit_status}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if connecting.done() and connecting.exception() is not None:
            # A QEMU that ends breaks the connection first, and its own words say more.
            await asyncio.wait({child.exit_status}, timeout=_COMMAND_TIMEOUT_S)
        if not child.exit_status.done():
            return await connecting
        connecting.cancel()
        with contextlib.suppress(asyncio.CancelledError, LumedError):
            await (await connecting).close()
        words = await asyncio.to_thread(read_last_words, spec.log)
        raise MachineFailed(
            f"QEMU ended with status {child.exit_status.result()}: {words or 'no message'}"
        )


class QemuMachine:
    """A running QEMU. See machine.driver.Machine for what each method promises."""

    def __init__(
        self,
        process: ProcessId,
        exit_status: asyncio.Future[int] | None,
        monitor: Monitor,
        agent_socket: Path,
    ) -> None:
        self._process = process
        self._exit_status = exit_status
        self._monitor = monitor
        self._agent_socket = agent_socket

    @property
    def process(self) -> ProcessId:
        """QEMU's process."""
        return self._process

    @property
    def exit_status(self) -> asyncio.Future[int] | None:
        """None after an adoption."""
        return self._exit_status

    @property
    def agent_socket(self) -> Path | None:
        """The host's end of the agent's channel."""
        return self._agent_socket

    async def query_agent_open(self, timeout_s: float) -> bool:
        """Whether a program in the guest has the channel open."""
        answer = await self._monitor.execute("query-chardev", timeout_s=timeout_s)
        devices = cast("list[dict[str, Any]]", answer)
        return any(d["label"] == "agent0" and d["frontend-open"] for d in devices)

    async def query_status(self, timeout_s: float) -> MachineStatus:
        """Ask QEMU."""
        answer = await self._monitor.execute("query-status", timeout_s=timeout_s)
        running = cast("dict[str, bool]", answer)["running"]
        return MachineStatus.RUNNING if running else MachineStatus.PAUSED

    async def events(self) -> AsyncIterator[MachineEvent]:
        """QEMU's events, as far as lumed cares."""
        async for message in self._monitor.events():
            event = _translate(cast("dict[str, Any]", message))
            if event is not None:
                yield event

    async def resume(self, timeout_s: float) -> None:
        """Send "cont"."""
        await self._monitor.execute("cont", timeout_s=timeout_s)

    async def press_power_button(self, timeout_s: float) -> None:
        """Send the ACPI event."""
        await self._monitor.execute("system_powerdown", timeout_s=timeout_s)

    async def quit(self, timeout_s: float) -> None:
        """End QEMU; a connection that breaks is the answer that was wanted."""
        with contextlib.suppress(OutcomeUnknown):
            await self._monitor.execute("quit", timeout_s=timeout_s)

    async def set_vnc_password(self, password: str | None) -> None:
        """Set it over the monitor, so that no argv and no log ever holds it."""
        if password is not None:
            await self._monitor.execute(
                "set_password",
                {"protocol": "vnc", "password": password},
                timeout_s=_COMMAND_TIMEOUT_S,
            )

    async def query_vnc_port(self, timeout_s: float) -> int | None:
        """The port that QEMU picked."""
        answer = cast(
            "dict[str, Any]", await self._monitor.execute("query-vnc", timeout_s=timeout_s)
        )
        return int(answer["service"]) if answer.get("enabled") else None

    async def screenshot(self, target: Path, timeout_s: float) -> None:
        """QEMU writes the file itself."""
        await self._monitor.execute(
            "screendump", {"filename": str(target), "format": "png"}, timeout_s=timeout_s
        )

    async def close(self) -> None:
        """Disconnect."""
        await self._monitor.close()


def _translate(message: dict[str, Any]) -> MachineEvent | None:
    data = message.get("data", {})
    match message["event"]:
        case "VSERPORT_CHANGE" if data.get("id") == "agent":
            return AgentOpened(bool(data["open"]))
        case "SHUTDOWN":
            return GuestShutDown(by_guest=bool(data["guest"]), reason=str(data.get("reason", "")))
        case "RESET":
            return GuestReset()
        case "STOP":
            return StatusChanged(MachineStatus.PAUSED)
        case "RESUME":
            return StatusChanged(MachineStatus.RUNNING)
        case "BLOCK_IO_ERROR" if data.get("action") == "stop":
            return DiskError(no_space=bool(data.get("nospace")))
        case _:
            return None


@contextlib.contextmanager
def _listening(runtime_dir: Path) -> Iterator[SocketFds]:
    """Listening sockets for QEMU; our copies are closed at the end, the names stay."""
    with contextlib.ExitStack() as stack:
        fds: list[int] = []
        for name in (MONITOR, SECOND_MONITOR, AGENT, SERIAL):
            path = runtime_dir / name
            path.unlink(missing_ok=True)
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            listener.bind(str(path))
            path.chmod(0o600)
            listener.listen(1)
            fds.append(listener.fileno())
        yield SocketFds(*fds)


async def _end_child(child: Child) -> None:
    send_signal(child.identity, signal.SIGKILL)
    await asyncio.shield(wait_gone(child.identity, 5))
