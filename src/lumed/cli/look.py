"""Looking at a machine: its screen, its console, the server's logs."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from lumed.cli.link import Link
from lumed.cli.names import VmName, complete_logs
from lumed.cli.output import clean, say, show
from lumed.cli.vms import Storage, UnneededFlag
from lumed.errors import LumedError, MissingDependency, WrongState
from lumed.viewer import has_desktop, plan_settings

_VIEWERS = ("remote-viewer", "gvncviewer", "vncviewer")
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
    if Path(program).name == "remote-viewer":
        _open_remote_viewer(program, name, vm.vnc_port, vm.vnc_url)
    else:
        say(f"the password is in: lume get {name} --format json")
        _spawn([program, f"127.0.0.1::{vm.vnc_port}"])


def _open_remote_viewer(program: str, name: str, port: int, url: str) -> None:
    password = url.removeprefix("vnc://:").rpartition("@")[0]
    descriptor, file = tempfile.mkstemp(prefix="lume-", suffix=".vv")
    with os.fdopen(descriptor, "wb") as settings:
        settings.write(plan_settings(port, password, name))
    _spawn([program, file])


def _spawn(command: list[str]) -> None:
    subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
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
