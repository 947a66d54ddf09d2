"""Where the server of a home listens."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumed.files import read_json_object
from lumed.store.layout import Home


def find_home(given: str | Path | None = None) -> tuple[Home, bool]:
    """The home (the given one, else LUME_HOME, else ~/.lume), and whether it was named."""
    named = given or os.environ.get("LUME_HOME") or None
    root = Path(named) if named else Path.home() / ".lume"
    return Home(Path(os.path.abspath(root.expanduser()))), bool(named)  # noqa: PTH100


@dataclass(frozen=True, slots=True)
class ServerRecord:
    """What a server has written down of itself; it may have been killed since."""

    url: str
    socket: Path
    pid: int
    start_ticks: int


def find_record(home: Home) -> ServerRecord | None:
    """The record of the server of that home; None without one, or while it is just starting."""
    try:
        told: dict[str, Any] = read_json_object(home.server_json)
        return ServerRecord(
            str(told["url"]), Path(told["socket"]), int(told["pid"]), int(told["startTicks"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_socket(home: Home) -> Path:
    """The unix socket on which a server of that home listens, if one runs."""
    record = find_record(home)
    return home.socket if record is None else record.socket
