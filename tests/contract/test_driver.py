"""What every MachineDriver must do. The fake one passes it too, or tests over it prove nothing."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lumed.claim import RunLock, is_locked, take_lock, wait_unlocked
from lumed.errors import LumedError, MachineFailed
from lumed.machine.driver import GuestShutDown, Machine, MachineDriver, MachineStatus
from lumed.machine.qemu.driver import QemuDriver
from lumed.machine.spec import MachineSpec
from lumed.model.host import Accelerator
from lumed.model.vm import Architecture, DiskFormat, Display, Firmware
from lumed.osproc import is_alive, send_signal, wait_gone
from lumed.server import get_qemu
from lumed.store.disk import create_empty
from lumed.units import MIB
from tests.doubles.fake_driver import FakeDriver


async def software(_: Architecture) -> Accelerator:
    return Accelerator("tcg", "tests")


def make_fake() -> MachineDriver:
    return FakeDriver()


def make_qemu() -> MachineDriver:
    return QemuDriver(get_qemu, software)


@pytest.fixture(params=[make_fake, make_qemu], ids=["fake", "qemu"])
def new_driver(request: pytest.FixtureRequest) -> Callable[[], MachineDriver]:
    make: Callable[[], MachineDriver] = request.param
    return make


@pytest.fixture
async def spec(tmp_path: Path) -> MachineSpec:
    await create_empty(tmp_path / "disk.qcow2", 16 * MIB)
    return MachineSpec(
        uuid=str(uuid.uuid4()),
        name="web",
        cpu_count=1,
        memory_bytes=64 * MIB,
        firmware=Firmware.BIOS,
        disk=tmp_path / "disk.qcow2",
        disk_format=DiskFormat.QCOW2,
        display=Display(),
        mac_address="52:54:00:00:00:01",
        runtime_dir=tmp_path / "run",
        log=tmp_path / "qemu.log",
        serial_log=tmp_path / "serial.log",
        vnc_password="sesame12",
    )


@contextlib.asynccontextmanager
async def launched(driver: MachineDriver, spec: MachineSpec) -> AsyncIterator[Machine]:
    machine = await driver.launch(spec)
    try:
        yield machine
    finally:
        send_signal(machine.process, signal.SIGKILL)
        assert await wait_gone(machine.process, 5)
        await machine.close()


def lock_of(tmp_path: Path) -> RunLock:
    lock = take_lock(tmp_path / "run.lock")
    assert lock is not None
    return lock


Make = Callable[[], MachineDriver]


async def test_a_launched_machine_runs_and_keeps_the_lock(
    new_driver: Make, spec: MachineSpec, tmp_path: Path
) -> None:
    driver = new_driver()
    await driver.check_ready(spec.architecture, spec.firmware)
    lock = lock_of(tmp_path)
    async with launched(driver, replace(spec, lock_fd=lock.fd)) as machine:
        lock.close()
        assert is_locked(tmp_path / "run.lock")
        assert is_alive(machine.process)
        assert await machine.query_status(2) is MachineStatus.RUNNING
        assert await machine.query_vnc_port(2) is not None
        assert not await machine.query_agent_open(2)
        await machine.press_power_button(2)
    assert await wait_unlocked(tmp_path / "run.lock", 2)


async def test_a_machine_without_a_password_has_no_screen_to_reach(
    new_driver: Make, spec: MachineSpec
) -> None:
    async with launched(new_driver(), replace(spec, vnc_password=None)) as machine:
        assert await machine.query_vnc_port(2) is None


async def test_quit_ends_it_and_the_events_say_that_no_guest_did_it(
    new_driver: Make, spec: MachineSpec
) -> None:
    async with launched(new_driver(), spec) as machine:

        async def collect() -> list[object]:
            return [event async for event in machine.events()]

        events = asyncio.create_task(collect())
        await machine.quit(2)
        assert await wait_gone(machine.process, 5)
        async with asyncio.timeout(5):
            seen = await events
        (shutdown,) = [event for event in seen if isinstance(event, GuestShutDown)]
        assert not shutdown.by_guest
        assert shutdown.reason == "host-qmp-quit"
        with pytest.raises(LumedError):
            await machine.query_status(2)


async def test_a_killed_machine_has_the_signal_as_its_status(
    new_driver: Make, spec: MachineSpec
) -> None:
    async with launched(new_driver(), spec) as machine:
        assert machine.exit_status is not None
        send_signal(machine.process, signal.SIGKILL)
        async with asyncio.timeout(5):
            assert await machine.exit_status == -signal.SIGKILL


async def test_a_machine_stays_when_it_is_let_go_and_another_driver_takes_it_up(
    new_driver: Make, spec: MachineSpec
) -> None:
    async with launched(new_driver(), spec) as machine:
        port = await machine.query_vnc_port(2)
        await machine.close()
        assert is_alive(machine.process)
        adopted = await new_driver().adopt(
            machine.process, spec.runtime_dir, spec.uuid, spec.vnc_password, 5
        )
        assert adopted.process == machine.process
        assert adopted.exit_status is None
        assert await adopted.query_status(2) is MachineStatus.RUNNING
        assert await adopted.query_vnc_port(2) == port
        await adopted.quit(2)
        assert await wait_gone(machine.process, 5)
        await adopted.close()


async def test_another_vms_machine_is_not_taken_up(new_driver: Make, spec: MachineSpec) -> None:
    async with launched(new_driver(), spec) as machine:
        await machine.close()
        with pytest.raises(MachineFailed):
            await new_driver().adopt(
                machine.process, spec.runtime_dir, str(uuid.uuid4()), spec.vnc_password, 5
            )
        assert is_alive(machine.process)


async def test_a_machine_that_is_gone_is_not_taken_up(new_driver: Make, spec: MachineSpec) -> None:
    driver = new_driver()
    async with launched(driver, spec) as machine:
        process = machine.process
    with pytest.raises(MachineFailed):
        await driver.adopt(process, spec.runtime_dir, spec.uuid, spec.vnc_password, 5)


async def test_a_start_that_fails_tells_why_and_leaves_no_process(
    new_driver: Make, spec: MachineSpec, tmp_path: Path
) -> None:
    missing = tmp_path / "missing.qcow2"
    lock = lock_of(tmp_path)
    with pytest.raises(MachineFailed, match=r"missing\.qcow2"):
        await new_driver().launch(replace(spec, disk=missing, lock_fd=lock.fd))
    lock.close()
    assert await wait_unlocked(tmp_path / "run.lock", 2)
