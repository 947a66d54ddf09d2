"""Serving: every listener has an application of its own, and one uvicorn serves them all."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import ssl
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from lumed.http.guard import refuse_user

# A client that keeps its connection open must not keep the server from ending.
_SHUTDOWN_S = 4
_TLS_HANDSHAKE_S = 10
_TLS_CLOSE_S = 2
_PEER_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: unix(7), SO_PEERCRED


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket, what answers there, and its TLS if it speaks it."""

    socket: socket.socket
    app: ASGIApp
    tls: ssl.SSLContext | None = None


async def serve(
    listeners: Sequence[Listener], on_ready: Callable[[], None], ending: asyncio.Event
) -> None:
    """Answer until SIGINT or SIGTERM, which set `ending`."""
    config = uvicorn.Config(
        listeners[0].app,
        http=H11Protocol,
        ws="none",
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
    await _Server(config, listeners, on_ready, ending).serve()


class _Server(uvicorn.Server):
    """uvicorn without its ten wake-ups a second: it sleeps until a signal ends it."""

    def __init__(
        self,
        config: uvicorn.Config,
        listeners: Sequence[Listener],
        on_ready: Callable[[], None],
        ending: asyncio.Event,
    ) -> None:
        super().__init__(config)
        self._listeners = listeners
        self._on_ready = on_ready
        self._end = ending

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn.Server, which has one application and one TLS for all of its sockets."""
        self.servers = [await self._start_listener(each) for each in self._listeners]
        self.started = True

    async def _start_listener(self, listener: Listener) -> asyncio.Server:
        tls: dict[str, Any] = {}
        if listener.tls is not None:
            tls = {
                "ssl": listener.tls,
                "ssl_handshake_timeout": _TLS_HANDSHAKE_S,
                "ssl_shutdown_timeout": _TLS_CLOSE_S,
            }
        return await asyncio.get_running_loop().create_server(
            lambda: _Connection(self.config, self.server_state, listener.app),
            sock=listener.socket,
            backlog=self.config.backlog,
            **tls,
        )

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


class _Connection(H11Protocol):
    """A connection to one listener's application; over a unix socket, of one of our users."""

    def __init__(self, config: uvicorn.Config, state: ServerState, app: ASGIApp) -> None:
        super().__init__(config, state, {})
        self.app = app

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.BaseProtocol."""
        super().connection_made(transport)
        uid = _find_peer_uid(transport)
        if uid not in (None, 0, os.geteuid()):
            self.app = refuse_user(uid)


def _find_peer_uid(transport: asyncio.Transport) -> int | None:
    """The user at the other end of a unix socket, as it was when it connected; else None."""
    peer = transport.get_extra_info("socket")
    if peer is None or peer.family != socket.AF_UNIX:
        return None
    raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    return int(_PEER_CREDENTIALS.unpack(raw)[1])
