"""`lume service`: the server of this home as a systemd user service.

KillMode=process: systemd ends the server only, so machines outlive a stop and a restart of the
service. They stay in its control group; at the next start systemd notes "left-over process" in
its journal and leaves them alone, and the server finds them as it always does. What ends them is
the end of the user's systemd: the last log-out, unless lingering is enabled, or a shutdown. They
are killed then, not shut down.
"""

from __future__ import annotations

import asyncio
import getpass
import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter, validators

from lumed.cli.link import DEFAULT_PORT
from lumed.cli.output import say, show, show_data
from lumed.cli.systemd import (
    UNIT,
    ask,
    ask_manager,
    find_server,
    find_url,
    main_pid,
    read_home,
    read_unit,
    run_tool,
    systemctl,
    unit_path,
    wait_ready,
)
from lumed.cli.vms import AsFormat
from lumed.client.discover import find_home
from lumed.errors import InvalidField, LumedError, NotPossibleHere, TimedOut
from lumed.files import write_atomic
from lumed.osproc import send_signal, wait_gone

if TYPE_CHECKING:
    from lumed.store.layout import Home

_END_S = 30.0
# A user manager's own PATH is short, and what the server runs may be elsewhere.
_KEPT = ("PATH", "LUME_ACCEL", "LUME_LOG_LEVEL")

HomeOption = Annotated[Path | None, Parameter(help="home directory (or LUME_HOME)")]

service_app = App(name="service", help="Keep a server running, as a systemd user service.")


@service_app.command
def install(
    *serve_options: Annotated[str, Parameter(help="behind --: options of lume serve")],
    port: Annotated[
        int, Parameter(help="TCP port of the API", validator=validators.Number(gte=1, lte=65535))
    ] = DEFAULT_PORT,
    linger: Annotated[
        bool, Parameter(negative="", help="from the boot on, not only while you are logged in")
    ] = False,
    home: HomeOption = None,
) -> None:
    """Install the service and start it; again, to change it. A server that runs is replaced.

    Machines run on meanwhile.

    Example: lume service install --port 7777 --linger

    Example: lume service install -- --compat-port 7778
    """
    if serve_options and not serve_options[0].startswith("-"):
        raise InvalidField(
            f"{serve_options[0]} is no option of lume serve", hint="look: lume serve --help"
        )
    found, named = find_home(home)
    command = _plan_command(found, named, port, serve_options)
    _check_manager(command)
    unit, text = unit_path(), plan_unit(command, found)
    is_new = read_unit() != text
    if is_new:
        unit.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(unit, text.encode(), 0o644)
        systemctl("daemon-reload")
    say(f"{unit} is {'written' if is_new else 'as it was'}")
    systemctl("enable", UNIT)
    # While another server holds the home, the service is active again and again, for moments.
    if _end_other_server(found) or is_new or not _is_active():
        # One that has failed too often would be refused.
        ask("reset-failed", UNIT)
        systemctl("restart", UNIT)
    url = wait_ready(found)
    say(f"{UNIT} is enabled, and running")
    _offer_linger(linger)
    show(url)


@service_app.command
def uninstall() -> None:
    """End the service and remove it; virtual machines stay, and those that run run on.

    Example: lume service uninstall
    """
    unit = unit_path()
    if not unit.exists():
        say(f"there is no {unit}")
        return
    _check_manager(_plan_command(*find_home(), DEFAULT_PORT, ()))
    systemctl("disable", "--now", UNIT)
    unit.unlink()
    systemctl("daemon-reload")
    say(f"{unit} is removed; machines run on, and the next lume command starts a server for them")


@service_app.command
def status(*, format: AsFormat = "text") -> int:
    """Say whether the service is installed, enabled and active, and where it listens.

    The exit status is 0 if it is active.

    Example: lume service status
    """
    unit = unit_path()
    text = read_unit()
    _check_manager(_plan_command(*find_home(), DEFAULT_PORT, ()))
    home, _ = find_home(read_home(text))
    active = _is_active()
    server = find_server(home)
    serves = server is not None and server.pid == main_pid()
    facts = {
        "installed": str(unit) if text else None,
        "enabled": ask("is-enabled", UNIT) == "enabled",
        "active": active,
        "home": str(home.root),
        "url": find_url(home) if serves else None,
        "lingers": _lingers(),
    }
    if text and server is not None and not serves:
        say(
            f"another server (process {server.pid}) has the home, so the service cannot serve it; "
            f"kill {server.pid}, and the next lume command starts the service"
        )
    if format != "text":
        show_data(facts, format)
    else:
        for key, value in facts.items():
            show(f"{key}: {_WORDS.get(value, value) if not isinstance(value, str) else value}")
    return 0 if active else 1


def plan_unit(command: tuple[str, ...], home: Home) -> str:
    """The unit file. Raises InvalidField for what it could not hold."""
    kept = [f"{name}={os.environ[name]}" for name in _KEPT if os.environ.get(name)]
    for word in (*command, *kept, str(home.root)):
        if not word.isprintable():
            raise InvalidField(f"{word!r:.200} has characters that no unit file can hold")
    return "\n".join(
        (
            "# Written by: lume service install",
            "[Unit]",
            "Description=Virtual machines over the Lume API (lumed)",
            "StartLimitIntervalSec=60",
            "StartLimitBurst=5",
            "",
            "[Service]",
            "Type=exec",
            f"ExecStart={' '.join(_quote(word).replace('$', '$$') for word in command)}",
            *(f"Environment={_quote(variable)}" for variable in kept),
            "WorkingDirectory=/",
            "Restart=on-failure",
            "RestartSec=2",
            "# The server only: machines outlive it, and one that lacked memory ends alone.",
            "KillMode=process",
            "OOMPolicy=continue",
            "",
            "[Install]",
            "WantedBy=default.target",
            "",
            "[X-Lumed]",
            f"X-Home={home.root}",
            "",
        )
    )


def _quote(word: str) -> str:
    """A word as systemd.syntax(7) has it; % begins a specifier."""
    if re.fullmatch(r"[A-Za-z0-9_@:=,./+-]+", word):
        return word
    text = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text}"'


def _plan_command(
    home: Home, named: bool, port: int, serve_options: tuple[str, ...]
) -> tuple[str, ...]:
    # A home that was not named has its settings elsewhere, see settings.settings_path.
    where = ("--home", str(home.root)) if named else ()
    python = (sys.executable, "-m", "lumed")
    return (*python, "serve", "--port", str(port), *where, *serve_options)


def _is_active() -> bool:
    return ask("is-active", UNIT) == "active"


def _check_manager(command: tuple[str, ...]) -> None:
    """Raise NotPossibleHere where no systemd manages this user's services."""
    if shutil.which("systemctl") is None:
        reason = "systemd is not here"
    else:
        said = ask_manager()
        if said is None:
            return
        reason = f"no systemd answers for this user: {said}"
    # The server writes logs of its own.
    line = f"{shlex.join(command)} >/dev/null 2>&1"
    # To cron a % is the end of the line.
    cron_line = line.replace("%", "\\%")
    more: tuple[str, ...] = ()
    if Path("/run/systemd/system").exists():
        more = (
            "su and sudo start none: log in as this user, or, as root:\n"
            f"loginctl enable-linger {getpass.getuser()}",
        )
    hints = (
        *more,
        "instead, now:",
        f"nohup {line} &",
        "and at every boot, as a line of crontab -e:",
        f"@reboot {cron_line}",
    )
    raise NotPossibleHere(f"There can be no service: {reason}", hint="\n  ".join(hints))


def _end_other_server(home: Home) -> bool:
    """End the server that runs for the home by other means, such as a command that needed one.

    False if there is none.
    """
    process = find_server(home)
    if process is None or process.pid == main_pid():
        return False
    send_signal(process, signal.SIGTERM)
    if not asyncio.run(wait_gone(process, _END_S)):
        raise TimedOut(f"The server that runs (process {process.pid}) did not end in {_END_S:g} s")
    say(f"the server that ran (process {process.pid}) is ended; its machines run on")
    return True


def _lingers() -> bool | None:
    """Whether this user's services run without a log-in; None where nobody knows."""
    if shutil.which("loginctl") is None:
        return None
    told = run_tool("loginctl", "show-user", getpass.getuser(), "-p", "Linger", "--value")
    return None if told.returncode != 0 else told.stdout.strip() == "yes"


def _offer_linger(wanted: bool) -> None:
    if _lingers():
        return
    if not wanted:
        say(
            "it starts when you log in, and ends with your last session, its machines too; "
            "to have it from the boot on: loginctl enable-linger"
        )
        return
    ended = run_tool("loginctl", "enable-linger")
    if ended.returncode != 0:
        raise LumedError(
            f"loginctl enable-linger failed: {ended.stderr.strip()}",
            hint=f"as root: loginctl enable-linger {getpass.getuser()}",
        )
    say("it starts at the boot, without a log-in")


_WORDS = {True: "yes", False: "no", None: "-"}
