"""Listening: the TCP port and the home's unix socket, served by one uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from lumed.errors import Conflict, InvalidField
from lumed.http.guard import Guard

# A client that keeps its connection open must not keep the server from ending.
_SHUTDOWN_S = 4


@dataclass(frozen=True, slots=True)
class Listeners:
    """Bound and listening sockets; url is where the TCP one is reached."""

    tcp: socket.socket
    unix: socket.socket
    url: str
    socket_path: Path

    @property
    def is_loopback(self) -> bool:
        """Whether only this host can reach the TCP one."""
        return ipaddress.ip_address(self.tcp.getsockname()[0]).is_loopback

    def close(self) -> None:
        """Close both; the unix socket's name goes too."""
        self.tcp.close()
        self.unix.close()
        self.socket_path.unlink(missing_ok=True)


def bind_listeners(host: str, port: int, socket_path: Path) -> Listeners:
    """Bind both sockets. Port 0 picks a free one.

    Raises Conflict if the port is taken, InvalidField if the host is no address of this machine.
    An old unix socket is replaced if nobody answers on it.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise InvalidField(
            f"--host {host!r}: {error.strerror}", fields={"host": "unknown"}
        ) from error
    tcp = socket.socket(family, kind, proto)
    unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tcp.bind(address)
            tcp.listen(1024)
        except OSError as error:
            raise Conflict(
                f"Cannot listen on {host}:{port}: {error.strerror}",
                hint=f"choose another port: lume serve --port {port + 1}",
            ) from error
        _bind_unix(unix, socket_path)
    except BaseException:
        tcp.close()
        unix.close()
        raise
    name, bound = tcp.getsockname()[:2]
    shown = f"[{name}]" if family == socket.AF_INET6 else name
    return Listeners(tcp, unix, f"http://{shown}:{bound}", socket_path)


def _bind_unix(unix: socket.socket, path: Path) -> None:
    if len(os.fsencode(path)) > 107:
        raise InvalidField(
            f"--socket {path} is too long: a socket's path has at most 107 bytes",
            fields={"socket": "too long"},
        )
    try:
        _remove_old_socket(path)
        unix.bind(str(path))
    except OSError as error:
        raise Conflict(f"Cannot listen on {path}: {error.strerror}") from error
    path.chmod(0o600)
    unix.listen(1024)


def _remove_old_socket(path: Path) -> None:
    """Remove what a killed server left; Conflict for anything else that has the name."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise Conflict(f"Cannot listen on {path}: it exists and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        with contextlib.suppress(OSError):
            probe.connect(str(path))
            raise Conflict(f"Cannot listen on {path}: somebody listens there already")
    path.unlink()


class _Server(uvicorn.Server):
    """uvicorn without its ten wake-ups a second: it sleeps until a signal ends it."""

    def __init__(
        self, config: uvicorn.Config, on_ready: Callable[[], None], ending: asyncio.Event
    ) -> None:
        super().__init__(config)
        self._on_ready = on_ready
        self._end = ending

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals in the loop; uvicorn's own way raises them again before our clean-up."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        # The second one does not wait for open requests.
        self.force_exit = self.should_exit
        self.should_exit = True
        self._end.set()

    async def main_loop(self) -> None:
        """See uvicorn.Server."""
        self._on_ready()
        await self._end.wait()


async def serve(
    app: Guard, listeners: Listeners, on_ready: Callable[[], None], ending: asyncio.Event
) -> None:
    """Answer until SIGINT or SIGTERM, which set `ending`."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        # The date would have to be renewed every second.
        date_header=False,
        timeout_graceful_shutdown=_SHUTDOWN_S,
        timeout_keep_alive=75,
    )
    # What was made until now lives for ever: without this, a collection takes 25 ms at random.
    gc.freeze()
    gc.enable()
    await _Server(config, on_ready, ending).serve(sockets=[listeners.tcp, listeners.unix])
