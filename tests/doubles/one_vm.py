"""The API of a server that has one virtual machine, which is whatever the test says."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import Any

STOPPED = {
    "name": "web",
    "state": "stopped",
    "os": "linux",
    "cpu": 1,
    "memorySize": 1 << 30,
    "disk": {"allocated": 0, "total": 1 << 30},
    "display": "1024x768",
    "locationName": "home",
    "networkMode": "nat",
    "uuid": "0f0e0d0c-0000-4000-8000-000000000000",
}


def running(place: tuple[str, int]) -> dict[str, object]:
    """What is different in a VM whose SSH server answers at that host address and port."""
    address, port = place
    forward = {"guestPort": 22, "address": address, "port": port, "protocol": "tcp"}
    return {
        "state": "running",
        "ipAddress": address,
        "sshAvailable": True,
        "forwards": [forward],
    }


@contextlib.contextmanager
def serve_one_vm(home: Path, vm: Mapping[str, object]) -> Iterator[None]:
    """Answer on the socket of a home's server; vm replaces keys of a stopped `web`."""
    known = {**STOPPED, **vm}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path.partition("?")[0] == f"/lume/vms/{known['name']}"
            what = known if found else {"message": f"not here: {self.path}", "code": "not_found"}
            body = json.dumps(what).encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Not on the test's stderr."""

    (home / "run").mkdir(parents=True)
    with ThreadingUnixStreamServer(str(home / "run" / "lume.sock"), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join(10)
