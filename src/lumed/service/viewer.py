"""A window on the machine's screen, where the server has a desktop to open it on."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from lumed.log import EventLog
from lumed.osproc import start_detached
from lumed.viewer import has_desktop, open_settings

_log = EventLog("viewer")


async def open_viewer(port: int, password: str, title: str, log: Path) -> None:
    """Open virt-viewer on a VNC port of this host; does nothing without a desktop or viewer."""
    program = await asyncio.to_thread(shutil.which, "remote-viewer")
    if not has_desktop() or program is None:
        _log.debug("no viewer", desktop=has_desktop(), program=program)
        return
    with open_settings(port, password, title) as settings:
        await start_detached([program, "-"], log=log, stdin=settings)
