"""Finding the machines that an earlier server left running, and closing the books on others.

Done at start, before the port is bound. A held run.lock is a machine, whatever else is known.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from lumed.claim import find_holder, is_locked
from lumed.errors import Damaged, LumedError
from lumed.log import EventLog
from lumed.machine.driver import MachineDriver
from lumed.model.end import EndCause, MachineEnd
from lumed.model.run import RunOptions
from lumed.osproc import ProcessId, find_process, is_alive, read_last_words
from lumed.service.live import LiveMachine, conclude
from lumed.service.operations import utc_now
from lumed.service.power import Power
from lumed.service.tasks import TaskOwner
from lumed.store.index import StoredVm
from lumed.store.layout import Home, vm_runtime_dir
from lumed.store.runrecord import RunRecord, read_run_record

_log = EventLog("adopt")

_PATIENCE_S = 2.0


async def adopt_machines(
    stored: Iterable[StoredVm], home: Home, driver: MachineDriver, power: Power, tasks: TaskOwner
) -> None:
    """Take up every running machine and record the end of those that are gone.

    Takes 2 s if a machine is silent: it then shows as unresponsive until it speaks.
    """
    found = await asyncio.to_thread(_find_machines, list(stored), home)
    async with asyncio.TaskGroup() as group:
        for live in found:
            group.create_task(_take_up(live, driver, power, tasks))


def _find_machines(stored: list[StoredVm], home: Home) -> list[LiveMachine]:
    machines: list[LiveMachine] = []
    for vm in stored:
        # A stopped VM has no record, so most need one look only.
        with contextlib.suppress(OSError):
            if vm.vm_dir.run_record.exists() or is_locked(vm.vm_dir.run_lock):
                machines.append(_find_machine(vm, home))
    return machines


def _find_machine(vm: StoredVm, home: Home) -> LiveMachine:
    """The machine of a VM that has a record or a held lock; process None if it is gone."""
    vm_dir = vm.vm_dir
    try:
        record = read_run_record(vm_dir.run_record)
    except Damaged as error:
        _log.warning("run record damaged", vm=vm.name, error=error)
        record = None
    if record is None:
        record = _guess_record(vm, home)
    live = LiveMachine(vm_dir, record)
    if is_locked(vm_dir.run_lock):
        live.process = record.process
        if live.process is None or not is_alive(live.process):
            # The old server was killed between the start and the record of its process.
            live.process = _find_process(vm_dir.run_lock)
    return live


def _find_process(lock: Path) -> ProcessId | None:
    pid = find_holder(lock)
    return None if pid is None else find_process(pid)


def _guess_record(vm: StoredVm, home: Home) -> RunRecord:
    """A record for a machine whose own is lost: enough to talk to it and to stop it."""
    config = vm.config
    uuid = config.uuid if config else ""
    return RunRecord(
        uuid=uuid,
        runtime_dir=str(vm_runtime_dir(home.runtime, uuid) if uuid else home.runtime / "lost"),
        accelerator="unknown",
        network=config.network if config else "nat",
        mac_address=config.mac_address if config else "",
        options=RunOptions(),
        started_at=utc_now(),
        problems=("its run record was lost: address, shares and screen are unknown",),
    )


async def _take_up(
    live: LiveMachine, driver: MachineDriver, power: Power, tasks: TaskOwner
) -> None:
    if live.process is None:
        await _close_books(live)
        return
    power.hold(live)
    power.watch(live)
    # Not bounded in time: a machine that was stopped (SIGSTOP) is taken up when it goes on.
    attaching = tasks.create_task(_attach(live, live.process, driver), f"adopt {live.vm_dir.name}")
    await asyncio.wait({attaching}, timeout=_PATIENCE_S)
    if not attaching.done():
        live.silent = True
        _log.warning("machine silent", vm=live.vm_dir.name, pid=live.process.pid)


async def _attach(live: LiveMachine, process: ProcessId, driver: MachineDriver) -> None:
    record = live.record
    try:
        machine = await driver.adopt(
            process, Path(record.runtime_dir), record.uuid, record.vnc_password, None
        )
        # A stop that was cut off is not gone on with: its caller never had an answer.
        port = await machine.query_vnc_port(_PATIENCE_S)
        found = replace(record, process=process, vnc_port=port, stop_requested=False)
        if found != record:
            await live.save(process=process, vnc_port=port, stop_requested=False)
        live.attach(machine)
    except LumedError as error:
        live.silent = live.machine is None
        _log.warning("machine not adopted", vm=live.vm_dir.name, error=error)
        return
    _log.info("machine adopted", vm=live.vm_dir.name, pid=process.pid)


async def _close_books(live: LiveMachine) -> None:
    """Record the end of a machine that went while no server was there."""
    if live.record.process is None and not live.record.stop_requested:
        detail = "the server ended before the machine was started"
        live.end = MachineEnd(EndCause.STOPPED, detail, utc_now())
    else:
        words = await asyncio.to_thread(read_last_words, live.vm_dir.qemu_log)
        live.end = conclude(live, None, words)
    await live.record_end()
