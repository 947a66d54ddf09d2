"""Numbers and logs of this host. Everything here blocks for a moment."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path

from lumed.model.host import MachineUsage
from lumed.osproc import read_usage
from lumed.service.live import LiveMachine
from lumed.store.index import VmIndex
from lumed.store.layout import Home
from lumed.store.tail import follow, read_tail
from lumed.store.vmdir import VmDir


def read_memory() -> tuple[int, int]:
    """Total and available memory in bytes (proc(5), /proc/meminfo)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    values = {
        key: int(rest.split()[0]) * 1024 for key, _, rest in (line.partition(":") for line in lines)
    }
    return values["MemTotal"], values["MemAvailable"]


def free_bytes(directory: Path) -> int:
    """What an ordinary user may still write there; 0 if the folder is gone."""
    try:
        usage = os.statvfs(directory)
    except OSError:
        return 0
    return usage.f_bavail * usage.f_frsize


def measure_machines(index: VmIndex, live: Mapping[Path, LiveMachine]) -> list[MachineUsage]:
    """What the process of each machine uses."""
    found: list[MachineUsage] = []
    for vm in index.list_vms():
        machine = live.get(vm.vm_dir.path)
        process = None if machine is None else machine.process
        usage = None if process is None else read_usage(process)
        if usage is not None:
            cpu_seconds, memory_bytes = usage.cpu_seconds, usage.memory_bytes
            found.append(MachineUsage(vm.name, vm.location_name, cpu_seconds, memory_bytes))
    return found


# The server's own logs are rotated at 2 MB.
_LONGEST_LOG_BYTES = 4_000_000


def read_logs(home: Home, kind: str, lines: int | None) -> dict[str, str]:
    """The server's logs by kind (info, error, or all), whole or their last lines."""
    return {
        key: read_tail(file, lines, _LONGEST_LOG_BYTES).decode(errors="replace")
        for key, file in _server_logs(home).items()
        if kind in (key, "all")
    }


def follow_log(home: Home, kind: str, lines: int | None) -> AsyncGenerator[bytes, None]:
    """One of the server's logs and what is written to it."""
    return follow(_server_logs(home)[kind], lines)


def read_vm_logs(vm_dir: VmDir, kind: str, lines: int | None) -> dict[str, str]:
    """A VM's logs of this run by kind (serial, qemu, or all), their last MiB or last lines."""
    return {
        key: read_tail(file, lines).decode(errors="replace")
        for key, file in _vm_logs(vm_dir).items()
        if kind in (key, "all")
    }


def follow_vm_log(vm_dir: VmDir, kind: str, lines: int | None) -> AsyncGenerator[bytes, None]:
    """One of a VM's logs and what is written to it, in this run and the next ones."""
    return follow(_vm_logs(vm_dir)[kind], lines)


def _server_logs(home: Home) -> dict[str, Path]:
    return {"info": home.logs / "lumed.log", "error": home.logs / "lumed.error.log"}


def _vm_logs(vm_dir: VmDir) -> dict[str, Path]:
    return {"serial": vm_dir.serial_log, "qemu": vm_dir.qemu_log}
