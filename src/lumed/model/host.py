"""What the host is and has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Check:
    """One line of `lume doctor`: detail says why, hint is the line that mends it."""

    name: str
    ok: bool
    value: str
    detail: str = ""
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class HostStatus:
    """The host in numbers. Memory and disk in bytes; the disk is that of the default location."""

    vm_count: int
    running_count: int
    max_vms: int
    cpu_count: int
    memory_total_bytes: int
    memory_available_bytes: int
    disk_free_bytes: int
    accelerator: str | None
    accelerator_reason: str | None
    network_interfaces: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MachineUsage:
    """What the machine of a VM has used so far in this run, as the host's processes count."""

    name: str
    location_name: str
    cpu_seconds: float
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Accelerator:
    """What runs guests, "kvm" or "tcg"; why, and what would make the better one work."""

    name: str
    reason: str
    hint: str | None = None
