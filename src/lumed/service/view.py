"""A VM as a reader sees it: what is on disk, joined with what runs."""

from __future__ import annotations

from pathlib import Path

from lumed.model.request import CreateRequest
from lumed.model.view import VmView
from lumed.model.vm import Display, GuestOs, VmConfig, VmState
from lumed.service.live import LiveMachine
from lumed.store.index import StoredVm
from lumed.units import MIB

# Below this an overlay-less disk holds nothing that could boot.
_EMPTY_DISK_BYTES = 4 * MIB


class Views:
    """Builds views, and hands out the same object while nothing has changed."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[StoredVm, object, str | None, VmView]] = {}

    def of(self, stored: StoredVm, live: LiveMachine | None, operation: str | None) -> VmView:
        """The view of a VM on disk."""
        facts = None if live is None else (live, live.state, live.record, *_changing(live))
        path = stored.vm_dir.path
        known = self._known.get(path)
        # Frozen objects that are replaced, never changed: identity is enough. The old one is
        # kept for that: the id of a freed object may be that of its successor.
        if known is not None and known[0] is stored and known[1:3] == (facts, operation):
            return known[3]
        view = _build(stored, live, operation)
        self._known[path] = (stored, facts, operation, view)
        return view


def _changing(live: LiveMachine) -> tuple[object, ...]:
    return (live.ip_address, live.ssh_available, live.agent_open.is_set(), live.problems)


def _build(stored: StoredVm, live: LiveMachine | None, operation: str | None) -> VmView:
    config = stored.config
    if config is None:
        return _broken(stored, live)
    if live is not None:
        state = live.state
    else:
        failed = stored.end is not None and stored.end.is_failure
        state = VmState.CRASHED if failed else VmState.STOPPED
    record = live.record if live else None
    address = live.ip_address if live else None
    return VmView(
        name=stored.name,
        state=state,
        os=config.os,
        cpu_count=config.cpu_count,
        memory_bytes=config.memory_bytes,
        disk_total_bytes=config.disk_size_bytes,
        disk_allocated_bytes=stored.allocated_bytes,
        display=config.display,
        location_name=stored.location_name,
        network=record.network if record else config.network,
        uuid=config.uuid,
        mac_address=config.mac_address,
        image=config.image,
        architecture=config.architecture.value,
        firmware=config.firmware.value,
        created_at=config.created_at or None,
        ip_address=address,
        ssh_available=live.ssh_available if live and address is not None else None,
        guest_agent=live.agent_open.is_set() if live else False,
        vnc_port=record.vnc_port if record else None,
        vnc_password=record.vnc_password if record else None,
        shared_directories=record.options.shared_directories if record else (),
        forwards=record.forwards if record else (),
        accelerator=record.accelerator if record else None,
        started_at=record.started_at if record else None,
        recovery_mode=record.options.recovery_mode if record else False,
        disks=record.options.disks if record else (),
        usb_storage=record.options.usb_storage if record else (),
        problems=live.problems if live else (),
        operation=operation,
        last_end=None if live else stored.end,
    )


def _broken(stored: StoredVm, live: LiveMachine | None) -> VmView:
    """A VM whose files cannot be read: all keys are there, and the reason."""
    return VmView(
        name=stored.name,
        state=live.state if live else VmState.BROKEN,
        os=GuestOs.LINUX,
        cpu_count=0,
        memory_bytes=0,
        disk_total_bytes=0,
        disk_allocated_bytes=stored.allocated_bytes,
        display=Display(),
        location_name=stored.location_name,
        network="nat",
        problems=(str(stored.damage), *(live.problems if live else ())),
    )


def view_of_request(
    request: CreateRequest, location_name: str, state: VmState = VmState.PROVISIONING
) -> VmView:
    """A VM that is being made, from what was asked for."""
    return VmView(
        name=request.name,
        state=state,
        os=request.os,
        cpu_count=request.cpu_count,
        memory_bytes=request.memory_bytes,
        disk_total_bytes=request.disk_size_bytes,
        disk_allocated_bytes=0,
        display=request.display,
        location_name=location_name,
        network=request.network,
        image=request.image,
        operation_action="pull" if state is VmState.PULLING else "create",
    )


def lacks_system(config: VmConfig, allocated_bytes: int) -> bool:
    """Whether the disk is as empty as it was made, so that nothing can boot from it."""
    return config.image is None and allocated_bytes < _EMPTY_DISK_BYTES
