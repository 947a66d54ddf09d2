"""From a command to the server of its home: the one that runs, or one that is started."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lumed.cli.output import say
from lumed.client.discover import find_home, find_socket
from lumed.errors import LumedError, TimedOut
from lumed.files import full_disk_is_no_space

if TYPE_CHECKING:
    from lumed.client.client import Client
    from lumed.store.layout import Home

DEFAULT_PORT = 7777
_START_S = 30.0


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class Link:
    """The options by which every command finds its server."""

    home: Annotated[Path | None, Parameter(help="home directory (or LUME_HOME)")] = None
    no_start: Annotated[bool, Parameter(negative="", help="do not start a server if none runs")] = (
        False
    )

    def connect(self) -> Client:
        """A client of the home's server, which is started if need be. Raises LumedError."""
        home, _ = find_home(self.home)
        if not answers(find_socket(home)):
            if self.no_start:
                raise LumedError(
                    f"No server runs for {home.root}",
                    hint="start one: lume serve; or leave out --no-start",
                )
            from lumed.cli.systemd import start_service

            if not start_service(home):
                self._start_server(home)
        from lumed.client.client import Client

        return Client(home=home.root)

    def _start_server(self, home: Home) -> None:
        home.prepare()
        log = home.logs / "serve.log"
        command = [sys.executable, "-m", "lumed", "serve", "--port", str(_choose_port())]
        if self.home is not None:
            command += ["--home", str(home.root)]
        reader, writer = os.pipe()
        with os.fdopen(reader) as said:
            with log.open("ab", buffering=0) as errors, os.fdopen(writer, "w") as stdout:
                with full_disk_is_no_space(home.logs, "start a server"):
                    # So that a page is there for what it may have to say.
                    errors.write(b"---\n")
                started_at = errors.tell()
                server = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=errors,
                    cwd="/",
                    start_new_session=True,
                )
            ready, _, _ = select.select([said], [], [], _START_S)
            line = said.readline().strip() if ready else ""
        if line:
            say(f"lume: no server was running; {line}")
        elif ready:
            server.wait(_START_S)
            if not _wait_for_another(home):
                raise _did_not_start(log, started_at)
        else:
            raise TimedOut(f"The server was not ready within {_START_S:g} s; see {log}")


def _wait_for_another(home: Home) -> bool:
    """Whether a server that another command has started answers; it may be just starting."""
    from lumed.claim import is_locked  # with asyncio; hardly ever needed

    give_up_at = time.monotonic() + _START_S
    while not answers(find_socket(home)):
        if not is_locked(home.server_lock) or time.monotonic() > give_up_at:
            return False
        time.sleep(0.02)
    return True


def answers(path: Path) -> bool:
    """Whether somebody listens on a unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(5)
        with contextlib.suppress(OSError):
            probe.connect(os.fspath(path))
            return True
    return False


def _choose_port() -> int:
    """The usual port, or any if another program has it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", DEFAULT_PORT))
        except OSError:
            return 0
    return DEFAULT_PORT


def _did_not_start(log: Path, since: int) -> LumedError:
    with log.open("rb") as file:
        file.seek(since)
        last_words = file.read(4096).decode(errors="replace").strip()
    if not last_words:
        return LumedError("The server did not start", hint="see why, in front: lume serve")
    return LumedError(f"The server did not start: {last_words.removeprefix('lume: ')}")
