"""Numbers and logs of this host. Everything here blocks for a moment."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

from lumed.store.layout import Home


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


def read_logs(home: Home, kind: str, lines: int | None) -> dict[str, str]:
    """The server's logs by kind (info, error, or all), whole or their last lines."""
    files = {"info": home.logs / "lumed.log", "error": home.logs / "lumed.error.log"}
    return {key: _read_tail(file, lines) for key, file in files.items() if kind in (key, "all")}


def _read_tail(path: Path, lines: int | None) -> str:
    try:
        with path.open(errors="replace") as file:
            return "".join(file if lines is None else deque(file, maxlen=lines))
    except FileNotFoundError:
        return ""
