"""lumed as a user has it: a server process, and an HTTP client in this one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench.sampling import ms_since


class Client:
    """An HTTP/1.1 client of one server that keeps its connection."""

    def __init__(self, url: str) -> None:
        self._host = urlsplit(url).netloc
        self._connection = HTTPConnection(self._host, timeout=120)

    def send(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        """The reply's body. Raises RuntimeError if it is no success."""
        data = None if body is None else json.dumps(body).encode()
        self._connection.request(method, path, data, {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        reply = response.read()
        if response.status >= 400:
            raise RuntimeError(f"{method} {path}: {response.status} {reply.decode()}")
        return reply

    def get(self, path: str) -> Any:
        """GET, as JSON."""
        return json.loads(self.send("GET", path))

    def drop(self) -> None:
        """Close the connection; the next request makes a new one."""
        self._connection.close()


class EventStream:
    """A subscriber of a server's events."""

    def __init__(self, url: str) -> None:
        self._connection = HTTPConnection(urlsplit(url).netloc, timeout=60)
        self._connection.request("GET", "/lume/events")
        self._response = self._connection.getresponse()

    def wait_for(self, name: str, state: str) -> None:
        """Read until an event says that a VM is in a state."""
        while line := self._response.readline():
            if line.startswith(b"data: "):
                data = json.loads(line[6:])
                if data.get("name") == name and data.get("state") == state:
                    return
        raise RuntimeError("the stream ended")

    def close(self) -> None:
        """Hang up."""
        self._response.close()
        self._connection.close()


class Process:
    """A server process that says on its first line of output where it listens."""

    def __init__(self, argv: list[str], bytecode: Path) -> None:
        started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, *argv],
            stdout=subprocess.PIPE,
            text=True,
            env=_compiling_to(bytecode),
        )
        if self._process.stdout is None:
            raise RuntimeError("the server has no output")
        line = self._process.stdout.readline()
        word = next((word for word in line.split() if word.startswith("http")), None)
        if word is None:
            self._process.wait()
            raise RuntimeError(f"the server did not start: {argv}")
        self.said_ready_ms = ms_since(started)
        self.url = word
        self.client = Client(word)
        self.started = started

    @property
    def pid(self) -> int:
        """The server's."""
        return self._process.pid

    def close(self) -> None:
        """End the server."""
        self.client.drop()
        self._process.terminate()
        try:
            self._process.wait(20)
        finally:
            self._process.kill()
            self._process.wait()
            if self._process.stdout is not None:
                self._process.stdout.close()

    def read_memory_mib(self, kind: str = "Rss") -> float:
        """What the process has in memory (proc(5), smaps_rollup): Rss, or Pss without shares."""
        for line in Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(f"{kind}:"):
                return int(line.split()[1]) / 1024
        raise RuntimeError(f"no {kind} in smaps_rollup")

    def read_peak_mib(self) -> float:
        """The most that the process ever had in memory (proc(5), VmHWM)."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
        raise RuntimeError("no VmHWM in status")

    def count_switches(self) -> int:
        """How often its threads have gone to sleep by themselves, and so were woken up again."""
        total = 0
        for status in Path(f"/proc/{self.pid}/task").glob("*/status"):
            for line in status.read_text().splitlines():
                if line.startswith("voluntary_ctxt_switches:"):
                    total += int(line.split()[1])
        return total


def _compiling_to(bytecode: Path) -> dict[str, str]:
    """The environment of a Python that keeps what it compiles there."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return env | {"PYTHONPYCACHEPREFIX": str(bytecode)}


class Lumed:
    """A temporary home and the servers that are started over it."""

    def __init__(self, directory: Path) -> None:
        self.root = directory
        self.home = directory / "home"
        self.bytecode = directory / "bytecode"

    @contextlib.contextmanager
    def serve(self, home: Path | None = None) -> Iterator[Process]:
        """A server over the home, ended at the end with the VMs that it runs."""
        argv = ["-m", "lumed", "serve", "--port", "0", "--home", str(home or self.home)]
        server = Process(argv, self.bytecode)
        try:
            yield server
        finally:
            try:
                for vm in server.client.get("/lume/vms"):
                    if vm["state"] not in ("stopped", "crashed"):
                        server.client.send("POST", f"/lume/vms/{vm['name']}/stop", {"force": True})
            finally:
                server.close()

    def run_python(self, *argv: str) -> float:
        """How long a Python process takes as a whole, in ms; what it prints is dropped."""
        started = time.perf_counter()
        env = _compiling_to(self.bytecode)
        command = [sys.executable, *argv]
        subprocess.run(command, env=env, stdout=subprocess.DEVNULL, check=True)
        return ms_since(started)

    def vm_dir(self, name: str) -> Path:
        """The folder of a VM."""
        return self.home / "vms" / name

    def home_with_vms(self, count: int) -> Path:
        """A home with so many stopped VMs, copies of one whose disk is empty."""
        home = self.root / f"home-{count}"
        if home.exists():
            return home
        model = self.vm_dir("model")
        if not model.exists():
            with self.serve() as server:
                create(server.client, "model", image=None)
        no_images = shutil.ignore_patterns("images")
        shutil.copytree(self.home / "cache", home / "cache", ignore=no_images)
        for number in range(count):
            copy = home / "vms" / f"vm-{number:04}"
            # The disks stay unused: links take no space.
            shutil.copytree(model, copy, copy_function=os.link)
            facts = json.loads((model / "lumed.json").read_bytes())
            facts["uuid"] = str(uuid.uuid4())
            (copy / "lumed.json").unlink()
            (copy / "lumed.json").write_text(json.dumps(facts, indent=2))
        with self.serve(home):
            pass  # compiles what is not compiled yet
        return home


def create(
    client: Client, name: str, *, image: str | None = "tiny", disk_size: str = "1GB"
) -> float:
    """Create a VM (1 CPU, 256 MB); the milliseconds until it shows as stopped."""
    body = {"name": name, "os": "linux", "cpu": 1, "memory": "256MB", "diskSize": disk_size}
    started = time.perf_counter()
    client.send("POST", "/lume/vms", body | ({"image": image} if image else {}))
    wait_until(lambda: client.get(f"/lume/vms/{name}")["state"] == "stopped", f"{name} made")
    return ms_since(started)


def wait_until(
    condition: Callable[[], bool], what: str, timeout_s: float = 180, every_s: float = 0.001
) -> None:
    """Ask again every millisecond or so. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(every_s)
