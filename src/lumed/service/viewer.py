"""A window on the machine's screen, where the server has a desktop to open it on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lumed.files import write_atomic
from lumed.log import EventLog
from lumed.osproc import start_detached

_log = EventLog("viewer")


def has_desktop() -> bool:
    """Whether this server could open a window at all."""
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


async def open_viewer(port: int, password: str, title: str, runtime_dir: Path, log: Path) -> None:
    """Open virt-viewer on a VNC port of this host; does nothing without a desktop or viewer.

    The password goes by a private file that the viewer deletes, never by its argv.
    """
    program = shutil.which("remote-viewer")
    if not has_desktop() or program is None:
        _log.debug("no viewer", desktop=has_desktop(), program=program)
        return
    file = runtime_dir / "viewer.vv"
    write_atomic(
        file,
        f"[virt-viewer]\ntype=vnc\nhost=127.0.0.1\nport={port}\npassword={password}\n"
        f"title={title}\ndelete-this-file=1\n".encode(),
        durable=False,
    )
    await start_detached([program, file], log=log)
