"""Sockets to listen on: the TCP port, that for Lume's own clients, and the home's unix socket."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from lumed.errors import Conflict, InvalidField


@dataclass(frozen=True, slots=True)
class Address:
    """Where the TCP ports are: the host as it was given, and what it means to bind(2)."""

    host: str
    family: socket.AddressFamily
    ip: str
    scope: tuple[object, ...]  # of IPv6: flow, and the interface of a link-local address

    @property
    def is_loopback(self) -> bool:
        """Whether only this host can reach it."""
        return ipaddress.ip_address(self.ip).is_loopback


def find_address(host: str) -> Address:
    """The address of a host's name. Raises InvalidField if it has none. Blocks: it may ask DNS."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no host can be called that"
        raise InvalidField(f"--host {host!r}: {reason}", fields={"host": "unknown"}) from error
    return Address(host, family, str(address[0]), address[2:])


@dataclass(frozen=True, slots=True)
class Listeners:
    """Bound and listening sockets; compat is there if a port was given for it."""

    tcp: socket.socket
    compat: socket.socket | None
    unix: socket.socket
    socket_path: Path

    def close(self) -> None:
        """Close all; the unix socket's name goes too."""
        for each in (self.tcp, self.compat, self.unix):
            if each is not None:
                each.close()
        self.socket_path.unlink(missing_ok=True)


def bind_listeners(
    address: Address, port: int, compat_port: int | None, socket_path: Path
) -> Listeners:
    """Bind all sockets. Port 0 picks a free one.

    Raises Conflict if a port is taken or the address is not this machine's.
    An old unix socket is replaced if nobody answers on it.
    """
    with contextlib.ExitStack() as undo:
        tcp = undo.enter_context(_bind_tcp(address, port, "--port"))
        compat = None
        if compat_port is not None:
            compat = undo.enter_context(_bind_tcp(address, compat_port, "--compat-port"))
        unix = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        _bind_unix(unix, socket_path)
        undo.pop_all()
    return Listeners(tcp, compat, unix, socket_path)


def url_of(tcp: socket.socket, *, tls: bool) -> str:
    """Where a bound TCP socket is reached."""
    name, port = tcp.getsockname()[:2]
    shown = f"[{name}]" if tcp.family == socket.AF_INET6 else name
    return f"{'https' if tls else 'http'}://{shown}:{port}"


def _bind_tcp(address: Address, port: int, option: str) -> socket.socket:
    # asyncio sets TCP_NODELAY only where the protocol is named: without, an answer whose head and
    # body are two packets waits 40 ms for the client's delayed acknowledgement.
    tcp = socket.socket(address.family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tcp.bind((address.ip, port, *address.scope))
        tcp.listen(1024)
    except OSError as error:
        tcp.close()
        raise Conflict(
            f"Cannot listen on {address.host}:{port}: {error.strerror}",
            hint=f"choose another port: lume serve {option} {port + 1 if port < 65535 else 0}",
        ) from error
    except BaseException:
        tcp.close()
        raise
    return tcp


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
