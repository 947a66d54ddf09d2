"""`lume ssh` and `lume cp`: the system's ssh and scp with the home's key.

Each VM's host key is taken down under the VM's uuid at the first connection, in the home's own
known_hosts, and checked from then on; a clone has another uuid, and another key. The user's own
ssh settings and agent play no part.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

from cyclopts import Parameter, validators

from lumed.cli.link import Link
from lumed.cli.names import VmName, complete_guest_paths
from lumed.cli.output import complain, say
from lumed.cli.vms import Storage
from lumed.client.discover import find_home
from lumed.errors import InvalidField, LumedError, Refused, TimedOut, WrongState
from lumed.files import write_atomic
from lumed.osproc import get_program

if TYPE_CHECKING:
    from lumed.client.models import Vm
    from lumed.store.layout import Home

User = Annotated[str, Parameter(name=["--user", "-u"], help="whom to log in as")]
Password = Annotated[
    str,
    Parameter(
        name=["--password", "-p"],
        help="for guests that do not know this home's key; empty: none",
        env_var="LUME_SSH_PASSWORD",
    ),
]
Timeout = Annotated[
    int,
    Parameter(
        name=["--timeout", "-t"],
        help="how many seconds to wait until the guest's SSH server answers; 0: without end",
        validator=validators.Number(gte=0),
    ),
]

# A path too, so that shells complete those of files.
Side = Annotated[str | Path, Parameter(completer=complete_guest_paths)]

_BANNER_S = 10.0
_PAUSE_S = 0.2
SSH_FAILED = 255  # ssh(1), "EXIT STATUS"
_PACKAGE = "openssh-client"
_PASSWORD = "LUME_SSH_PASSWORD"  # noqa: S105 - the variable, not the word
_ASKPASS = f"#!/bin/sh\nprintf '%s\\n' \"${_PASSWORD}\"\n".encode()
_FIRST_CONTACT = "Warning: Permanently added"
_IN_A_GUEST = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*):(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Login:
    """What ssh and scp are called with, and for whom."""

    vm: Vm
    address: str
    user: str
    arguments: tuple[str, ...]
    env: Mapping[str, str]
    known_hosts: Path

    def explain(self, said: str) -> LumedError:
        """What ssh's own words mean."""
        if "Host key verification failed" in said:
            return Refused(
                f"The host key of {self.vm.name} is not the one it had: its system was made anew, "
                f"or another machine answers at {self.address}",
                hint="if it was made anew, forget the old one: "
                f"ssh-keygen -f {shlex.quote(str(self.known_hosts))} -R {self.vm.uuid}",
            )
        if "Permission denied (" in said:
            return LumedError(
                f"{self.vm.name} does not let {self.user} in, neither with this home's key nor "
                "with the password",
                hint="say whom, and with which password: -u USER -p PASSWORD",
            )
        return LumedError(said)


def ssh(
    name: VmName,
    /,
    *command: str,
    user: User = "lume",
    password: Password = "lume",  # noqa: S107 - what the seed gives every guest
    timeout: Timeout = 60,
    storage: Storage = None,
    link: Link = Link(),  # noqa: B008
) -> int:
    """Log in to a running virtual machine, or run COMMAND in it; options come before COMMAND.

    As with ssh, the guest's shell reads COMMAND, and its exit status is passed on; 255 says that
    it could not be run.

    Example: lume ssh web

    Example: lume ssh web ls -la /var/log
    """
    try:
        program = str(get_program("ssh", package=_PACKAGE))
        login = _find_login(link, name, storage, user, password, timeout)
        where = ("--", login.address, *command)
        if sys.stdin.isatty() and sys.stdout.isatty():
            # The terminal, its signals and job control are ssh's.
            _become((program, *login.arguments, "-t", *where), login.env)
        return _run_command(login, program, where)
    except LumedError as error:
        complain(error)
        return SSH_FAILED


def cp(
    source: Side,
    target: Side,
    /,
    *,
    recursive: Annotated[
        bool, Parameter(name=["--recursive", "-r"], negative="", help="with all that is in it")
    ] = False,
    user: User = "lume",
    password: Password = "lume",  # noqa: S107
    timeout: Timeout = 60,
    storage: Storage = None,
    link: Link = Link(),  # noqa: B008
) -> None:
    """Copy a file to or from a running virtual machine: NAME:PATH on one side.

    PATH is seen from the user's home in the guest. A file here with a colon: ./a:b

    Example: lume cp report.txt web:

    Example: lume cp -r web:/var/log logs
    """
    source, target = str(source), str(target)
    sides = (_IN_A_GUEST.fullmatch(source), _IN_A_GUEST.fullmatch(target))
    match sides:
        case (re.Match() as remote, None) | (None, re.Match() as remote):
            pass
        case (None, None):
            raise InvalidField(
                "Neither side is in a virtual machine",
                hint="write NAME:PATH for the one that is, such as web:report.txt",
            )
        case _:
            raise InvalidField(
                "Both sides are in virtual machines", hint="copy it here first, then there"
            )
    if sides[0] is None:
        _check_source(Path(source), recursive)
    program = str(get_program("scp", package=_PACKAGE))
    login = _find_login(link, remote[1], storage, user, password, timeout)
    host = f"[{login.address}]" if ":" in login.address else login.address
    paths = (
        f"{host}:{side[2]}" if side is not None else _unmistakable(text)
        for side, text in zip(sides, (source, target), strict=True)
    )
    argv = [program, *login.arguments, *(["-r"] if recursive else []), "--", *paths]
    ended = subprocess.run(
        argv, env=login.env, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False
    )
    # It names itself by its path.
    said = ended.stderr.decode(errors="replace").replace(f"{program}: ", "").strip()
    if ended.returncode != 0:
        raise login.explain(said or f"scp failed with status {ended.returncode}")
    if said:
        say(said)


def _check_source(path: Path, recursive: bool) -> None:
    if not path.exists():
        raise LumedError(f"{path} does not exist")
    if path.is_dir() and not recursive:
        raise LumedError(f"{path} is a directory", hint="copy all of it: lume cp -r")


def _unmistakable(path: str) -> str:
    """A path that scp takes neither for an option nor for one of another host."""
    return path if path.startswith("/") else f"./{path}"


def _find_login(
    link: Link, name: str, storage: str | None, user: str, password: str, timeout_s: int
) -> Login:
    """How to reach a VM, once its SSH server answers. Raises WrongState, TimedOut."""
    home, _ = find_home(link.home)
    with link.connect() as client:
        vm = client.get_vm(name, storage)
        if not vm.is_alive:
            raise WrongState(f"{name} is not running: it is {vm.state}", hint=f"lume run {name}")
        if vm.network == "none":
            raise WrongState(
                f"{name} has no network", hint="its console: the socket in lume get --format json"
            )
        give_up_at = time.monotonic() + (timeout_s or math.inf)
        vm = client.wait_vm(name, "ip", timeout_s or math.inf)
    place = vm.find_forward(22)
    if place is None:
        raise WrongState(f"Nothing leads from here to the SSH server of {name}")
    if not vm.ssh_available and not _wait_banner(place, give_up_at):
        raise TimedOut(
            f"No SSH server answered in {name} within {timeout_s} s",
            hint=f"what it does: lume logs {name}",
        )
    address, port = place
    return Login(
        vm=vm,
        address=address,
        user=user,
        arguments=_plan_arguments(home, vm, port, user, password, timeout_s),
        env=_plan_env(home, password),
        known_hosts=home.known_hosts,
    )


def _wait_banner(place: tuple[str, int], give_up_at: float) -> bool:
    """Wait until an SSH server says its name there (RFC 4253, 4.2).

    lumed's server asks once, and for 0.3 s, which a busy guest in software emulation may exceed.
    """
    while (left_s := give_up_at - time.monotonic()) > 0:
        with contextlib.suppress(OSError):
            timeout_s = min(left_s, _BANNER_S)
            with socket.create_connection(place, timeout_s) as connection:
                connection.settimeout(timeout_s)
                if connection.recv(4) == b"SSH-":
                    return True
        # Nothing tells when a guest begins to listen: its forward accepts from the start.
        time.sleep(_PAUSE_S)
    return False


def _plan_arguments(
    home: Home, vm: Vm, port: int, user: str, password: str, timeout_s: int
) -> tuple[str, ...]:
    options: dict[str, object] = {
        "HostKeyAlias": vm.uuid or vm.name,
        "UserKnownHostsFile": _quote(home.known_hosts),
        "GlobalKnownHostsFile": "/dev/null",
        "StrictHostKeyChecking": "accept-new",
        "HashKnownHosts": "no",
        "CheckHostIP": "no",
        "UpdateHostKeys": "no",
        "IdentityFile": _quote(home.ssh_key),
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "PreferredAuthentications": "publickey,password" if password else "publickey",
        "NumberOfPasswordPrompts": 1,
        "User": _quote(user),
        "Port": port,
        "LogLevel": "ERROR",
    }
    if timeout_s:
        options["ConnectTimeout"] = timeout_s
    return ("-F", "/dev/null", *(f"-o{key}={value}" for key, value in options.items()))


def _quote(value: object) -> str:
    """As ssh_config(5) has arguments: in quotes, and with % doubled, which begins a token."""
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text.replace("%", "%%")}"'


def _plan_env(home: Home, password: str) -> dict[str, str]:
    """The environment in which ssh gets the password: by a program, so it is in no argv."""
    program = home.ssh_key.with_name("askpass")
    try:
        if not program.exists() or program.read_bytes() != _ASKPASS:
            program.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(program, _ASKPASS, 0o700, durable=False)
    except OSError:
        # On a read-only home the key is still good.
        return dict(os.environ)
    return {
        **os.environ,
        _PASSWORD: password,
        "SSH_ASKPASS": str(program),
        "SSH_ASKPASS_REQUIRE": "force",
    }


def _become(argv: tuple[str, ...], env: Mapping[str, str]) -> NoReturn:
    os.execve(argv[0], argv, env)  # noqa: S606


def _run_command(login: Login, program: str, where: Sequence[str]) -> int:
    """Run ssh to its end; its own words go to a file, apart from those of the command.

    So 255 of the command, which is passed on, is told from 255 of ssh, which raises LumedError.
    """
    with tempfile.NamedTemporaryFile("r", prefix="lume-ssh-", errors="replace") as log:
        # Why a connection ended it tells at INFO; it takes the first value of an option.
        argv = [program, "-oLogLevel=INFO", *login.arguments, "-T", "-E", log.name, *where]
        with subprocess.Popen(argv, env=login.env) as process:
            usual = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
            try:
                status = process.wait()
            finally:
                signal.signal(signal.SIGTERM, usual)
        lines = [line.strip() for line in log if not line.startswith(_FIRST_CONTACT)]
    said = "\n".join(lines)
    if said and status == SSH_FAILED:
        raise login.explain(said)
    if said:
        say(said)
    return status if status >= 0 else 128 - status
