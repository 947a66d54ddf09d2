"""Looking at a machine: its screen, its console, the server's logs."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from lumed.cli.link import Link
from lumed.cli.names import VmName, complete_logs
from lumed.cli.output import clean, say, show
from lumed.cli.vms import Storage, UnneededFlag
from lumed.errors import LumedError, MissingDependency, ToolFailed, WrongState
from lumed.model.run import FIRST_VNC_PORT
from lumed.viewer import has_desktop, open_settings

_VIEWERS = ("remote-viewer", "gvncviewer", "vncviewer")
# One that cannot open its window (a wrong DISPLAY) took 0.2 s to say so.
_ENDS_AT_ONCE_S = 1.0
_SERVER_LOGS = ("all", "info", "error")


def attach(
    name: VmName,
    /,
    *,
    display: Annotated[Literal["native", "vnc"], Parameter(show=False)] = "native",
    storage: Storage = None,
    link: Link = Link(),  # noqa: B008
) -> None:
    """Open a viewer on the screen of a running virtual machine.

    Example: lume attach web
    """
    with link.connect() as client:
        vm = client.get_vm(name, storage)
    if vm.vnc_url is None or vm.vnc_port is None:
        raise WrongState(f"{name} has no screen to look at: it is {vm.state}")
    program = next(filter(None, map(shutil.which, _VIEWERS)), None)
    if program is None or not has_desktop():
        say(f"open it with any VNC viewer; a picture: lume screenshot {name}")
        show(vm.vnc_url)
        if has_desktop():
            raise MissingDependency("No VNC viewer is installed", hint="apt install virt-viewer")
        raise LumedError("There is no desktop here to open a viewer on")
    password = vm.vnc_url.removeprefix("vnc://:").rpartition("@")[0]
    if Path(program).name == "remote-viewer":
        with open_settings(vm.vnc_port, password, name) as settings:
            _start_viewer([program, "-"], settings)
        return
    say(f"should it ask for a password: lume get {name} --format json")
    if Path(program).name == "gvncviewer":
        # It knows no ports: it takes ::5901 for display 0, which is another machine's.
        where = f"127.0.0.1:{vm.vnc_port - FIRST_VNC_PORT}"
    else:
        where = f"127.0.0.1::{vm.vnc_port}"
    # TigerVNC's takes the password from there, see vncviewer(1); others ask for it.
    _start_viewer([program, where], env={**os.environ, "VNC_PASSWORD": password})


def _start_viewer(
    command: list[str], stdin: int = subprocess.DEVNULL, env: dict[str, str] | None = None
) -> None:
    """Open the window, which outlives this command. Raises ToolFailed if it does not stay."""
    viewer = subprocess.Popen(
        command,
        stdin=stdin,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=env,
    )
    with contextlib.suppress(subprocess.TimeoutExpired):
        status = viewer.wait(_ENDS_AT_ONCE_S)
        if status != 0:
            program = Path(command[0]).name
            raise ToolFailed(
                f"{program} ended at once with status {status}",
                hint=f"to see why, start it without arguments: {program}",
            )


def screenshot(
    name: VmName,
    file: Path | None = None,
    /,
    *,
    storage: Storage = None,
    link: Link = Link(),  # noqa: B008
) -> None:
    """Take a picture (PNG) of the screen of a running virtual machine.

    Example: lume screenshot web web.png
    """
    if file is None and sys.stdout.isatty():
        file = Path(f"{name}.png")
    with link.connect() as client:
        picture = client.screenshot(name, storage)
    if file is None or str(file) == "-":
        sys.stdout.buffer.write(picture)
    else:
        file.write_bytes(picture)
        say(f"written to {file}")


def logs(
    name: Annotated[
        str,
        Parameter(
            help="a virtual machine; or all, info, error: the server's own",
            completer=complete_logs,
        ),
    ] = "all",
    /,
    *,
    lines: Annotated[int | None, Parameter(name=["--lines", "-l"], help="the last ones")] = None,
    follow: Annotated[
        bool, Parameter(name=["--follow", "-f"], negative="", help="and what comes")
    ] = False,
    qemu: Annotated[
        bool, Parameter(negative="", help="what QEMU said, not the guest's console")
    ] = False,
    verbose: UnneededFlag = False,
    link: Link = Link(),  # noqa: B008
) -> None:
    """Show what a guest prints on its serial console, or what the server logs.

    Example: lume logs web --follow
    """
    with link.connect() as client:
        if name in _SERVER_LOGS:
            if follow:
                last = 10 if lines is None else lines
                kind: Literal["info", "error"] = "error" if name == "error" else "info"
                _stream(client.follow_server_logs(kind, last))
            else:
                kinds = ("info", "error") if name == "all" else (name,)
                known = client.server_logs(lines=lines)
                _stream(known[kind].encode() for kind in kinds)
        elif follow:
            _stream(client.follow_vm_logs(name, type="qemu" if qemu else "serial", lines=lines))
        else:
            which: Literal["qemu", "serial"] = "qemu" if qemu else "serial"
            _stream([client.vm_logs(name, type=which, lines=lines)[which].encode()])


def _stream(chunks: Iterable[bytes]) -> None:
    """Write bytes as they come: as they are, unless a terminal would obey them."""
    gc.enable()
    raw = not sys.stdout.isatty()
    for chunk in chunks:
        if raw:
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
        else:
            text = chunk.decode(errors="replace").replace("\r\n", "\n")
            sys.stdout.write(clean(text))
            sys.stdout.flush()
