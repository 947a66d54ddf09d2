"""HTTP for the client that blocks, by the standard library.

A third of `lume ls` was the import of httpx2 (255 of 726 million instructions); http.client is 44.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urlsplit

from lumed import __version__
from lumed.client.connection import CONNECT_S, explain_failure

if TYPE_CHECKING:
    from lumed.client.calls import Call
    from lumed.client.connection import Target


class Wire:
    """The connections to one server; several threads may use it. Raises ServerUnreachable,
    TimedOut, OutcomeUnknown.
    """

    def __init__(self, target: Target) -> None:
        """Nothing is connected yet."""
        self._target = target
        url = urlsplit(target.base_url)
        self._path = url.path
        self._host, self._port = url.hostname or "", url.port
        self._tls = target.make_tls() if url.scheme == "https" else None
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()

    def request(self, call: Call[Any], key: str | None) -> tuple[int, bytes]:
        """Send a call and read its answer: status and content. key is an Idempotency-Key."""
        with self._exchange(call, key, call.timeout_s) as reply:
            return reply.status, reply.read()

    def stream(
        self, call: Call[Any], silence_s: float | None
    ) -> contextlib.AbstractContextManager[http.client.HTTPResponse]:
        """An answer to be read as it comes. silence_s is how long it may pause, None: for ever."""
        return self._exchange(call, None, silence_s)

    def close(self) -> None:
        """Close the connections that nobody uses now."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    @contextlib.contextmanager
    def _exchange(
        self, call: Call[Any], key: str | None, silence_s: float | None
    ) -> Iterator[http.client.HTTPResponse]:
        connection = self._take() or self._connect(call)
        try:
            if connection.sock is not None:
                connection.sock.settimeout(silence_s)
            self._send(connection, call, key)
            reply = connection.getresponse()
            yield reply
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            is_silent = isinstance(error, TimeoutError)
            raise explain_failure(self._target, call.method, error, is_silent=is_silent) from error
        except BaseException:
            connection.close()
            raise
        if reply.isclosed() and connection.sock is not None:
            with self._lock:
                self._idle.append(connection)
        else:
            connection.close()  # there is more to come, or the server has closed it

    def _take(self) -> http.client.HTTPConnection | None:
        """A connection that was used before, and that the server has not closed meanwhile."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if connection.sock is not None and not _has_come(connection.sock):
                return connection
            connection.close()

    def _connect(self, call: Call[Any]) -> http.client.HTTPConnection:
        connection: http.client.HTTPConnection
        if self._target.socket is not None:
            connection = _UnixConnection(self._target.socket)
        elif self._tls is not None:
            connection = http.client.HTTPSConnection(
                self._host, self._port, timeout=CONNECT_S, context=self._tls
            )
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_S)
        try:
            connection.connect()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise explain_failure(self._target, call.method, error, is_connected=False) from error
        return connection

    def _send(
        self, connection: http.client.HTTPConnection, call: Call[Any], key: str | None
    ) -> None:
        path = self._path + call.path
        if call.params:
            path += "?" + urlencode(call.params)
        headers = {"User-Agent": f"lumed/{__version__}", **self._target.headers}
        if key:
            headers["Idempotency-Key"] = key
        body = None
        if call.body is not None:
            body = json.dumps(call.body).encode()
            headers["Content-Type"] = "application/json"
        connection.request(call.method, path, body, headers)


def _has_come(connected: socket.socket) -> bool:
    """Whether there is something to read, if only the end."""
    poll = select.poll()  # select.select ends at descriptor 1,024
    poll.register(connected, select.POLLIN)
    return bool(poll.poll(0))


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=CONNECT_S)
        self._unix_path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._unix_path)
