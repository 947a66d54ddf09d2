"""Watching a server process, and asking it again: real sockets, its end, its death."""

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


def test_a_write_that_comes_again_after_a_kill_has_its_answer(tmp_path: Path) -> None:
    home = tmp_path / "home"
    body = {"name": "web", "os": "linux", "cpu": 1, "memory": "64MB", "diskSize": "64MB"}
    key = {"Idempotency-Key": "3f6c"}
    with serving(home) as server, server.client() as client:
        first = client.post("/vms", json=body, headers=key)
        server.kill()
        server.start()
        again = httpx.post(f"{server.url}/lume/vms", json=body, headers=key, verify=NO_TLS)
        assert (again.status_code, again.content) == (202, first.content)
        assert again.headers["idempotency-replayed"] == "true"
