"""Watching a server process: real sockets, and its end."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx

from tests.server.test_serve import serving
from tests.system.harness import NO_TLS, Server


def events(server: Server) -> Iterator[tuple[str, Any]]:
    """The events of a server, until it ends."""
    with (
        httpx.Client(timeout=20, verify=NO_TLS) as client,
        client.stream("GET", f"{server.url}/lume/events") as reply,
    ):
        kind = ""
        for line in reply.iter_lines():
            if line.startswith("event: "):
                kind = line[7:]
            elif line.startswith("data: "):
                yield kind, json.loads(line[6:])


def test_streams_and_waiters_do_not_hold_up_the_end(tmp_path: Path) -> None:
    with serving(tmp_path / "home") as server:
        stream = events(server)
        assert next(stream) == ("reset", {"reason": "start"})
        url = httpx.URL(server.url)
        with socket.create_connection((url.host, url.port)) as stuck:
            # One that reads nothing, and one that leaves its connection open.
            stuck.sendall(b"GET /lume/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            started = time.monotonic()
            server.stop()
        assert time.monotonic() - started < 2
        assert list(stream) == []
