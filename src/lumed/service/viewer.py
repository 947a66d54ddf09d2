"""A window on the machine's screen, where the server has a desktop to open it on."""

from __future__ import annotations

import shutil
from pathlib import Path

from lumed.files import write_atomic
from lumed.log import EventLog
from lumed.osproc import start_detached
from lumed.viewer import has_desktop, plan_settings

_log = EventLog("viewer")


async def open_viewer(port: int, password: str, title: str, runtime_dir: Path, log: Path) -> None:
    """Open virt-viewer on a VNC port of this host; does nothing without a desktop or viewer."""
    program = shutil.which("remote-viewer")
    if not has_desktop() or program is None:
        _log.debug("no viewer", desktop=has_desktop(), program=program)
        return
    file = runtime_dir / "viewer.vv"
    write_atomic(file, plan_settings(port, password, title), durable=False)
    await start_detached([program, file], log=log)
