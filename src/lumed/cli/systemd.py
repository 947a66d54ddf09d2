"""The user's systemd, and lumed's service there; see cli/service.py."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lumed.cli.link import answers
from lumed.cli.output import say
from lumed.client.discover import find_record
from lumed.errors import LumedError, TimedOut
from lumed.osproc import ProcessId, find_process

if TYPE_CHECKING:
    from lumed.store.layout import Home

UNIT = "lumed.service"
_TOOL_S = 60.0
_START_S = 60.0
_LOOK_S = 1.0
_HOME_LINE = re.compile(r"^X-Home=(.*)$", re.MULTILINE)
_FAILED = ("auto-restart", "failed")


def unit_path() -> Path:
    """The unit file, whether it is there or not."""
    config = os.environ.get("XDG_CONFIG_HOME") or ""
    # The specification has relative paths ignored.
    folder = Path(config) if config.startswith("/") else Path.home() / ".config"
    return folder / "systemd" / "user" / UNIT


def read_unit() -> str:
    """The text of the unit file, "" without one."""
    try:
        return unit_path().read_text(errors="replace")
    except FileNotFoundError:
        return ""


def read_home(unit_text: str) -> str | None:
    """The home that the unit's server serves."""
    found = _HOME_LINE.search(unit_text)
    return None if found is None else found[1]


def run_tool(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run systemctl or loginctl, for this user. Raises TimedOut."""
    try:
        return subprocess.run(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TOOL_S,
            check=False,
            env={**os.environ, "XDG_RUNTIME_DIR": _runtime_dir()},
        )
    except subprocess.TimeoutExpired as error:
        said = f"{program} {' '.join(arguments)}"
        raise TimedOut(f"{said} did not end within {_TOOL_S:g} s") from error


def _runtime_dir() -> str:
    """Where the user's systemd listens: su, sudo and cron tell nothing, or another user's."""
    given = os.environ.get("XDG_RUNTIME_DIR")
    try:
        if given and Path(given).stat().st_uid == os.getuid():
            return given
    except OSError:
        pass
    return f"/run/user/{os.getuid()}"


def ask_manager() -> str | None:
    """Why no systemd answers for this user; None if one does."""
    ended = run_tool("systemctl", "--user", "show-environment")
    if ended.returncode == 0:
        return None
    return ended.stderr.strip() or f"status {ended.returncode}"


def systemctl(*arguments: str) -> None:
    """Have systemctl do that. Raises LumedError with what it said."""
    ended = run_tool("systemctl", "--user", *arguments)
    if ended.returncode != 0:
        said = ended.stderr.strip() or f"status {ended.returncode}"
        raise LumedError(f"systemctl --user {' '.join(arguments)} failed: {said}")


def ask(*arguments: str) -> str:
    """What systemctl answers; its status says no more."""
    return run_tool("systemctl", "--user", *arguments).stdout.strip()


def main_pid() -> int:
    """The process of the service, 0 if it has none."""
    told = ask("show", "-p", "MainPID", "--value", UNIT)
    return int(told) if told.isdigit() else 0


def find_server(home: Home) -> ProcessId | None:
    """The server that runs for the home, of the service or not."""
    record = find_record(home)
    process = None if record is None else find_process(record.pid)
    if record is None or process is None or process.start_ticks != record.start_ticks:
        return None
    return process


def find_url(home: Home) -> str | None:
    """Where a server of that home answers."""
    record = find_record(home)
    return record.url if record is not None and answers(record.socket) else None


def wait_ready(home: Home) -> str:
    """The URL of the service's server, once it answers. Raises LumedError if it does not."""
    hint = f"why: journalctl --user -u {UNIT} -n 20"
    give_up_at = time.monotonic() + _START_S
    while True:
        look_again_at = time.monotonic() + _LOOK_S
        while (url := find_url(home)) is None and time.monotonic() < look_again_at:
            time.sleep(0.02)
        process = find_server(home)
        if url is not None and process is not None and process.pid == main_pid():
            return url
        if ask("show", "-p", "SubState", "--value", UNIT) in _FAILED:
            raise LumedError("The server of the service ends at once", hint=hint)
        if time.monotonic() > give_up_at:
            raise TimedOut(f"The service was not ready within {_START_S:g} s", hint=hint)


def start_service(home: Home) -> bool:
    """Have the home's service started, and wait until it answers; False if it has none, or no
    systemd runs for this user. Raises LumedError if it does not start.

    A server of our own would hold the home, and the service could not come up any more: at the
    log-in, and while systemd waits with its restart, commands find no server either.
    """
    if read_home(read_unit()) != str(home.root):
        return False
    try:
        if ask_manager() is not None:
            return False
    except OSError:
        return False
    try:
        systemctl("start", UNIT)
        url = wait_ready(home)
        say(f"lume: no server was running; {UNIT} is started, and listens on {url}")
    except LumedError:
        # A server that somebody has started meanwhile will do.
        if find_url(home) is None:
            raise
    return True
