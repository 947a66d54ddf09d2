"""Starting and ending machines: the order of steps, each claimed and recorded before it acts."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import string
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lumed.claim import RunLock, take_lock
from lumed.errors import (
    LumedError,
    MachineFailed,
    NoSpace,
    NotPossibleHere,
    WrongState,
)
from lumed.files import check_free_space, write_atomic
from lumed.guest.seed import Seed, SeedShare, make_seed
from lumed.guest.sshkey import read_or_make_key
from lumed.hostpath import check_host_path
from lumed.images.tiny import RESCUE_ARGUMENTS
from lumed.log import EventLog
from lumed.machine.driver import Machine, MachineDriver
from lumed.machine.shares import (
    ShareDevice,
    ShareSupport,
    find_share_support,
    plan_shares,
    start_share,
)
from lumed.machine.spec import DirectKernel, MachineSpec
from lumed.model.end import EndCause, MachineEnd
from lumed.model.request import RunRequest
from lumed.model.run import RunOptions, SharedDirectory, VncMode
from lumed.model.vm import Architecture, DiskFormat, Firmware, VmConfig
from lumed.naming import hostname_of
from lumed.network.plan import Network, NetworkKind, parse_network
from lumed.network.start import check_network, start_network, sweep_networks
from lumed.osproc import send_signal
from lumed.service.attached import check_disks, check_iso, check_vnc_port
from lumed.service.live import LiveMachine
from lumed.service.operations import RunningOperation, utc_now
from lumed.service.tasks import TaskOwner
from lumed.service.view import lacks_system
from lumed.service.viewer import open_viewer
from lumed.store.index import StoredVm
from lumed.store.layout import Home, vm_runtime_dir
from lumed.store.runrecord import RunRecord
from lumed.store.vmdir import VmDir
from lumed.threads import run_to_end
from lumed.units import MIB

_log = EventLog("machine")

_COMMAND_S = 2.0
# A machine writes its logs and records at least.
_NEEDED_BYTES = 16 * MIB
_PASSWORD_LENGTH = 8  # more do not count (RFC 6143, section 7.2.2)
_PASSWORD_LETTERS = string.ascii_letters + string.digits
# How long the guest gets after each step; together with _COMMAND_S under 20 s (contract, 1).
_BUTTON_S, _BUTTON_WITH_AGENT_S, _AGENT_S, _QUIT_S, _TERM_S, _KILL_S = 11, 6, 4, 2, 1, 1
# For a guest that was seen to go down, instead of the agent's step.
_GOING_DOWN_S = 7
_PRESS_EVERY_S = 3.0


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A run whose every part was checked. problems do not hinder it; the user should know."""

    options: RunOptions
    network: Network
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RescueSystem:
    """The kernel that recovery mode boots."""

    kernel: Path
    initramfs: Path


class Power:
    """Starts and ends machines. Who may do so when is the caller's matter."""

    def __init__(
        self,
        home: Home,
        driver: MachineDriver,
        tasks: TaskOwner,
        accelerator_name: Callable[[Architecture], Awaitable[str]],
        rescue: Callable[[RunningOperation], Awaitable[RescueSystem]],
        on_change: Callable[[str], None],
    ) -> None:
        """on_change is told the name of a VM whose machine has changed, come or gone."""
        self._home = home
        self._driver = driver
        self._tasks = tasks
        self._accelerator_name = accelerator_name
        self._rescue = rescue
        self._on_change = on_change
        self._share_support: ShareSupport | None = None
        self.live: dict[Path, LiveMachine] = {}

    async def plan(self, stored: StoredVm, config: VmConfig, request: RunRequest) -> RunPlan:
        """Check everything that can be checked before the machine is started."""
        if request.recovery_mode and config.architecture is not Architecture.AMD64:
            raise NotPossibleHere(
                f"The rescue system is made for amd64, and {stored.name} is an "
                f"{config.architecture} guest",
                hint="run it with a rescue ISO for its architecture as `mount`",
            )
        network = parse_network(request.network or config.network)
        shares = await asyncio.to_thread(_check_shares, request)
        mount = None if request.mount is None else await asyncio.to_thread(check_iso, request.mount)
        disks, usb_storage = await asyncio.to_thread(
            check_disks, request.disks, request.usb_storage, stored.vm_dir.disk
        )
        await asyncio.to_thread(
            check_free_space, stored.vm_dir.path, _NEEDED_BYTES, f"run {stored.name}"
        )
        await self._driver.check_ready(config.architecture, config.firmware)
        await check_network(network)
        if request.vnc_port is not None and request.vnc is VncMode.ENABLED:
            await asyncio.to_thread(check_vnc_port, request.vnc_port)
        problems: list[str] = []
        if len(request.vnc_password or "") > _PASSWORD_LENGTH:
            problems.append(f"of the VNC password only the first {_PASSWORD_LENGTH} letters count")
        boots_from_disk = mount is None and not request.recovery_mode
        if boots_from_disk and lacks_system(config, stored.allocated_bytes):
            problems.append(
                "the disk is empty and no installer is attached: create the VM from an image, "
                'or run it with "mount": "/path/to/installer.iso"'
            )
        options = RunOptions(
            no_display=request.no_display,
            shared_directories=shares,
            recovery_mode=request.recovery_mode,
            mount=mount,
            network=request.network,
            vnc=request.vnc,
            vnc_port=request.vnc_port,
            vnc_password=request.vnc_password,
            disks=disks,
            usb_storage=usb_storage,
        )
        return RunPlan(options, network, tuple(problems))

    async def claim(self, stored: StoredVm, config: VmConfig, plan: RunPlan) -> LiveMachine:
        """Record that the VM is about to run; from here on it shows as starting."""
        record = RunRecord(
            uuid=config.uuid,
            runtime_dir=str(vm_runtime_dir(self._home.runtime, config.uuid)),
            accelerator=await self._accelerator_name(config.architecture),
            network=str(plan.network),
            mac_address=config.mac_address,
            options=plan.options,
            started_at=utc_now(),
            problems=plan.problems,
        )
        live = LiveMachine(stored.vm_dir, record)
        self.hold(live)
        return live

    def hold(self, live: LiveMachine) -> None:
        """Count a machine as there, until it is let go of."""
        live.on_change = partial(self._on_change, live.vm_dir.name)
        self.live[live.vm_dir.path] = live
        live.on_change()

    def _forget(self, live: LiveMachine) -> None:
        self.live.pop(live.vm_dir.path, None)
        live.on_change()

    async def start(
        self, live: LiveMachine, config: VmConfig, plan: RunPlan, operation: RunningOperation
    ) -> None:
        """Start the machine. Whatever fails is recorded as its end, and raised."""
        try:
            async with contextlib.AsyncExitStack() as stack:
                machine = await self._launch(live, config, plan, operation, stack)
            live.process = machine.process
            self.watch(live)
            vnc_port = await machine.query_vnc_port(_COMMAND_S)
            await live.save(process=machine.process, vnc_port=vnc_port)
        except BaseException as error:
            await asyncio.shield(self._give_up(live, error))
            raise
        live.attach(machine)
        _log.info(
            "machine started",
            vm=live.vm_dir.name,
            pid=machine.process.pid,
            accel=live.record.accelerator,
            address=live.record.address,
        )
        password = live.record.vnc_password
        if not plan.options.no_display and vnc_port is not None and password is not None:
            await open_viewer(vnc_port, password, live.vm_dir.name, live.vm_dir.qemu_log)

    def forget_unstarted(self, live: LiveMachine) -> None:
        """Drop a claim that never became a machine."""
        if live.process is None:
            self._forget(live)

    def watch(self, live: LiveMachine) -> None:
        """Follow a machine to its end, as a task of the engine."""

        def forget(ended: LiveMachine) -> None:
            self._forget(ended)
            if ended.record.network.startswith(NetworkKind.BRIDGED):
                self._tasks.create_task(sweep_networks(), "sweep networks")

        self._tasks.create_task(live.watch(forget), f"watch {live.vm_dir.name}")

    async def _launch(
        self,
        live: LiveMachine,
        config: VmConfig,
        plan: RunPlan,
        operation: RunningOperation,
        stack: contextlib.AsyncExitStack,
    ) -> Machine:
        """Claim, record, gather the parts, act. stack closes our copies of descriptors."""
        vm_dir = live.vm_dir
        lock = await run_to_end(partial(take_lock, vm_dir.run_lock), undo=_release)
        if lock is None:
            raise WrongState(f"Virtual machine already running: {vm_dir.name}")
        stack.callback(lock.close)
        password = _choose_password(plan.options)
        await live.save(vnc_password=password)
        runtime_dir = Path(live.record.runtime_dir)
        await asyncio.to_thread(_prepare_files, vm_dir, runtime_dir)

        operation.stage("connecting")
        network = await stack.enter_async_context(
            start_network(
                plan.network,
                uuid=config.uuid,
                mac=config.mac_address,
                ports=config.ports,
                taken={m.record.address for m in self.live.values() if m.record.address},
                log=vm_dir.qemu_log,
            )
        )
        if network is not None:
            problem = () if network.problem is None else (network.problem,)
            # In memory first: it is written below, before the machine is started.
            live.record = replace(
                live.record,
                address=network.address,
                forwards=network.forwards,
                problems=(*live.record.problems, *problem),
            )
        shares = await self._open_shares(live, plan, stack)
        seed = await asyncio.to_thread(self._write_seed, vm_dir, config, shares)
        direct = None
        if plan.options.recovery_mode:
            system = await self._rescue(operation)
            direct = DirectKernel(system.kernel, system.initramfs, RESCUE_ARGUMENTS)
        # The address is needed to find the machine again, should we be killed before it is up.
        await live.save()
        operation.stage("starting the machine")
        return await self._driver.launch(
            MachineSpec(
                uuid=config.uuid,
                name=vm_dir.name,
                cpu_count=config.cpu_count,
                memory_bytes=config.memory_bytes,
                architecture=config.architecture,
                firmware=config.firmware,
                disk=vm_dir.disk,
                disk_format=DiskFormat.QCOW2,
                display=config.display,
                mac_address=config.mac_address,
                runtime_dir=runtime_dir,
                log=vm_dir.qemu_log,
                serial_log=vm_dir.serial_log,
                uefi_vars=vm_dir.uefi_vars if config.firmware is Firmware.UEFI else None,
                seed=seed,
                iso=None if plan.options.mount is None else Path(plan.options.mount),
                disks=plan.options.disks,
                usb_storage=plan.options.usb_storage,
                direct_kernel=direct,
                network=network,
                shares=shares,
                vnc_password=password,
                vnc_port=plan.options.vnc_port,
                lock_fd=lock.fd,
            )
        )

    async def _open_shares(
        self, live: LiveMachine, plan: RunPlan, stack: contextlib.AsyncExitStack
    ) -> tuple[ShareDevice, ...]:
        wanted = plan.options.shared_directories
        if not wanted:
            return ()
        if self._share_support is None:
            self._share_support = await find_share_support()
        support = self._share_support
        if support.problem is not None:
            problem = f"shares use 9p, which some guests cannot mount: {support.problem}"
            live.record = replace(live.record, problems=(*live.record.problems, problem))
        devices: list[ShareDevice] = []
        for index, directory in enumerate(wanted):
            device = await start_share(
                directory,
                index,
                support,
                runtime_dir=Path(live.record.runtime_dir),
                log=live.vm_dir.qemu_log,
            )
            stack.callback(device.close)
            devices.append(device)
        return tuple(devices)

    def _write_seed(self, vm_dir: VmDir, config: VmConfig, shares: tuple[ShareDevice, ...]) -> Path:
        home_key = read_or_make_key(self._home.ssh_key)
        keys = config.ssh_keys if home_key is None else (home_key, *config.ssh_keys)
        image = make_seed(
            Seed(
                instance_id=config.uuid,
                hostname=hostname_of(vm_dir.name),
                ssh_keys=keys,
                shares=tuple(SeedShare(share.directory, share.transport) for share in shares),
                user_data=config.user_data,
                is_clone=config.is_clone,
            )
        )
        # Not durable: it is made anew at each run.
        write_atomic(vm_dir.seed, image, durable=False)
        return vm_dir.seed

    async def _give_up(self, live: LiveMachine, error: BaseException) -> None:
        if live.process is not None:
            # It came up, but could not be recorded: a machine that the next server would not
            # find must not stay.
            await self.stop(live, force=True)
        if isinstance(error, asyncio.CancelledError):
            cause, detail = EndCause.STOPPED, "its start was cancelled"
        else:
            cause, detail = EndCause.FAILED_START, str(error)
        live.end = MachineEnd(cause, detail, utc_now())
        await live.record_end()

    async def stop(self, live: LiveMachine, *, force: bool) -> None:
        """End a machine by the first step that works; returns when it is gone.

        Raises MachineFailed if not even a kill ended it within 20 s.
        """
        # Recorded first: a server that is killed here must not call this end a crash.
        with contextlib.suppress(NoSpace):
            await live.save(stop_requested=True)
        live.record = replace(live.record, stop_requested=True)
        live.on_change()
        live.stop_asking()
        for step in self._ladder(live, force=force):
            live.stop_step = step.name
            try:
                await step.act()
            except LumedError as error:
                _log.debug("step failed", vm=live.vm_dir.name, step=step.name, error=error)
                continue
            if await _wait(live.ended, step.patience_s):
                return
        raise MachineFailed(
            f"{live.vm_dir.name} is still there after SIGKILL",
            hint="its process hangs in the kernel; see the host's own log (dmesg)",
        )

    def _ladder(self, live: LiveMachine, *, force: bool) -> Iterator[Step]:
        machine = live.machine
        # A paused guest hears nothing, and a silent machine costs time at each question.
        if machine is not None and not (force or live.paused or live.silent):
            with_agent = live.agent_open.is_set()
            patience = _BUTTON_WITH_AGENT_S if with_agent else _BUTTON_S
            yield Step("power-button", partial(_press_until, live, machine, patience), 0)
            if with_agent and not live.agent_open.is_set():
                # Its agent ended with the other services: it has heard the button.
                yield Step("power-button", _do_nothing, _GOING_DOWN_S)
            elif with_agent and live.agent is not None:
                yield Step("agent", partial(live.agent.shutdown, _COMMAND_S), _AGENT_S)
        if machine is not None and not live.silent:
            yield Step("quit", partial(machine.quit, _COMMAND_S), _QUIT_S)
        yield Step("sigterm", partial(_signal, live, signal.SIGTERM), _TERM_S)
        yield Step("sigkill", partial(_signal, live, signal.SIGKILL), _KILL_S)


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the stop ladder, and how long the machine then gets."""

    name: str
    act: Callable[[], Awaitable[None]]
    patience_s: float


async def _press_until(live: LiveMachine, machine: Machine, patience_s: float) -> None:
    """Press the power button, again and again: a guest that is still booting misses it."""
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + patience_s
    while (left := give_up_at - loop.time()) > 0 and not live.ended.is_set():
        await machine.press_power_button(_COMMAND_S)
        await _wait(live.ended, min(left, _PRESS_EVERY_S))


async def _do_nothing() -> None:
    pass


async def _signal(live: LiveMachine, number: signal.Signals) -> None:
    if live.process is not None:
        send_signal(live.process, number)


async def _wait(event: asyncio.Event, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass
    return event.is_set()


def _release(lock: RunLock | None) -> None:
    if lock is not None:
        lock.close()


def _choose_password(options: RunOptions) -> str | None:
    """What VNC asks for; None without VNC."""
    if options.vnc is VncMode.DISABLED:
        return None
    return options.vnc_password or "".join(
        secrets.choice(_PASSWORD_LETTERS) for _ in range(_PASSWORD_LENGTH)
    )


def _check_shares(request: RunRequest) -> tuple[SharedDirectory, ...]:
    wanted = [
        (check_host_path(share.host_path), share.read_only) for share in request.shared_directories
    ]
    return plan_shares(wanted)


def _prepare_files(vm_dir: VmDir, runtime_dir: Path) -> None:
    runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    vm_dir.end_record.unlink(missing_ok=True)
    for log in (vm_dir.serial_log, vm_dir.qemu_log):
        if log.exists():
            log.rename(log.with_suffix(".log.1"))
        log.touch(mode=0o600)
