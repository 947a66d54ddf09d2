"""The API of a server with one virtual machine and images, which are what the test says."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
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

_IMAGE = {
    "id": "0123456789ab",
    "platform": {"os": "linux", "architecture": "amd64"},
    "size": 0,
    "virtualSize": 1 << 30,
    "createdAt": "2026-01-01T00:00:00Z",
    "lastUsedAt": "2026-01-01T00:00:00Z",
    "vms": [],
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
def serve_one_vm(
    home: Path, vm: Mapping[str, object], image_names: Sequence[str] = ()
) -> Iterator[None]:
    """Answer on the socket of a home's server; vm replaces keys of a stopped `web`."""
    known = {**STOPPED, **vm}
    answers = {
        f"/lume/vms/{known['name']}": known,
        "/lume/vms": [known],
        "/lume/images": [{**_IMAGE, "name": name, "names": [name]} for name in image_names],
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = answers.get(self.path.partition("?")[0])
            unknown = {"message": f"not here: {self.path}", "code": "not_found"}
            body = json.dumps(unknown if known is None else known).encode()
            self.send_response(404 if known is None else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Not on the test's stderr."""

    (home / "run").mkdir(parents=True)
    with ThreadingUnixStreamServer(str(home / "run" / "lume.sock"), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join(10)
