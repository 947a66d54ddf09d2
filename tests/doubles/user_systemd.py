"""systemctl and loginctl of a user's systemd that has one service, for tests on machines without.

What it does is what counts here: a unit file is read at daemon-reload only; a stop sends SIGTERM
to the main process alone (KillMode=process); a start that ends at once is `auto-restart`. Its
memory is the folder $USER_SYSTEMD, whose `calls` has a line for each call.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

UNIT = Path(os.environ["XDG_CONFIG_HOME"]) / "systemd" / "user" / "lumed.service"
FOLDER = Path(os.environ["USER_SYSTEMD"])


def main(program: str, words: list[str]) -> int:
    """One call."""
    with (FOLDER / "calls").open("a") as calls:
        calls.write(shlex.join([program, *words]) + "\n")
    state_file = FOLDER / "state.json"
    state: dict[str, Any] = {"loaded": None, "enabled": False, "pid": 0, "linger": False}
    if state_file.exists():
        state = json.loads(state_file.read_text())
    if program == "loginctl":
        if words[0] == "enable-linger":
            state["linger"] = True
        else:
            print("yes" if state["linger"] else "no")
        status = 0
    else:
        status = control([word for word in words if word != "--user"], state)
    state_file.write_text(json.dumps(state))
    return status


def control(words: list[str], state: dict[str, Any]) -> int:
    """What systemctl does."""
    active = is_alive(state["pid"])
    match words:
        case ["daemon-reload"]:
            state["loaded"] = UNIT.read_text() if UNIT.exists() else None
        case ["enable", _]:
            state["enabled"] = True
        case ["disable", "--now", _]:
            state["enabled"] = False
            stop(state)
        case ["restart", _]:
            stop(state)
            start(state)
        case ["start", _]:
            if not active:
                start(state)
        case ["is-active", _]:
            print("active" if active else "inactive")
            return 0 if active else 3
        case ["is-enabled", _]:
            print("enabled" if state["enabled"] else "disabled")
        case ["show", "-p", "MainPID", "--value", _]:
            print(state["pid"] if active else 0)
        case ["show", "-p", "SubState", "--value", _]:
            print("running" if active else "auto-restart" if state["pid"] else "dead")
        case ["show-environment"] | ["reset-failed", _]:
            pass
        case _:
            print(f"unknown: {words}", file=sys.stderr)
            return 1
    return 0


def start(state: dict[str, Any]) -> None:
    """Start what ExecStart says, as systemd.syntax(7) has its words."""
    line = re.search(r"^ExecStart=(.*)$", state["loaded"] or "", re.MULTILINE)
    assert line is not None
    words = [word.replace("$$", "$").replace("%%", "%") for word in shlex.split(line[1])]
    with (FOLDER / "journal").open("ab") as journal:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=journal, stderr=journal, start_new_session=True
        )
    state["pid"] = process.pid


def stop(state: dict[str, Any]) -> None:
    """SIGTERM to the main process, and wait for its end."""
    if is_alive(state["pid"]):
        os.kill(state["pid"], signal.SIGTERM)
        give_up_at = time.monotonic() + 20
        while is_alive(state["pid"]):
            assert time.monotonic() < give_up_at
            time.sleep(0.01)
    state["pid"] = 0


def is_alive(pid: int) -> bool:
    """Whether the process is there, and no zombie."""
    try:
        return pid > 0 and ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
