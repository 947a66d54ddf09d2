"""A real server process with real machines, and what tests do with it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2 as httpx

from lumed.claim import find_holder, is_locked
from lumed.osproc import find_process

SMALL = {"os": "linux", "cpu": 1, "memory": "256MB", "diskSize": "1GB", "image": "tiny"}
BOOT_S = 60.0
# Everything here is plain HTTP, and a context with certificates costs 60 ms a client.
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
LUME = (sys.executable, "-m", "lumed")


class Server:
    """`lume serve` on a home; killed and started at will."""

    def __init__(
        self,
        home: Path,
        *,
        command: Sequence[str] = LUME,
        env: Mapping[str, str] | None = None,
        port: int = 0,
        arguments: Sequence[str] = (),
        stderr: Path | None = None,
    ) -> None:
        self.home = home
        self._command = (*command, "serve", "--port", str(port), "--home", str(home), *arguments)
        self._env = {**os.environ, **(env or {})}
        self._stderr = stderr
        self.process: subprocess.Popen[str] | None = None
        self.said = ""
        self.url = ""

    def start(self) -> None:
        """Start it and wait until it says where it listens."""
        with contextlib.ExitStack() as stack:
            stderr = None if self._stderr is None else stack.enter_context(self._stderr.open("ab"))
            self.process = subprocess.Popen(
                self._command,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=self._env,
                cwd="/",
            )
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 20)
        self.said = self.process.stdout.readline() if ready else ""
        match = re.search(r"listens on (https?://\S+)", self.said)
        if match is None:
            # Its status comes a moment after the end of what it says.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
        assert match, f"the server said {self.said!r}, status {self.process.poll()}"
        self.url = match[1]

    def stop(self) -> None:
        """SIGTERM; it must end by itself, without a fault."""
        if self.process is not None:
            self.process.terminate()
            assert self._collect() == 0

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self._collect()

    def _collect(self) -> int:
        assert self.process is not None
        status = self.process.wait(15)
        if self.process.stdout is not None:
            self.said += self.process.stdout.read()
            self.process.stdout.close()
        self.process = None
        return status

    def client(self) -> httpx.Client:
        """A client of this server."""
        return httpx.Client(base_url=f"{self.url}/lume", timeout=30, verify=NO_TLS)

    def call(self, method: str, path: str, status: int | None = None, **options: Any) -> Any:
        """One request; the parsed reply."""
        with self.client() as client:
            reply = client.request(method, path, **options)
        if status is not None:
            assert reply.status_code == status, reply.text
        return reply.json()

    def vm(self, name: str) -> dict[str, Any]:
        """GET of a VM."""
        return dict(self.call("GET", f"/vms/{name}"))

    def wait_for(
        self, name: str, what: Callable[[dict[str, Any]], object], timeout_s: float = BOOT_S
    ) -> dict[str, Any]:
        """Ask for a VM until `what` holds."""
        give_up_at = time.monotonic() + timeout_s
        while True:
            vm = self.vm(name)
            if what(vm):
                return vm
            assert time.monotonic() < give_up_at, f"not within {timeout_s} s: {vm}"
            time.sleep(0.05)

    def wait_operation(self, operation_id: str, timeout_s: float = BOOT_S) -> dict[str, Any]:
        """Ask for an operation until it is over."""
        give_up_at = time.monotonic() + timeout_s
        while True:
            operation = dict(self.call("GET", f"/operations/{operation_id}", 200))
            if operation["status"] != "running":
                return operation
            assert time.monotonic() < give_up_at, operation
            time.sleep(0.05)

    def create(self, name: str, **more: object) -> dict[str, Any]:
        """Create a VM and wait until it is stopped."""
        self.call("POST", "/vms", 202, json={"name": name, **SMALL, **more})
        made = self.wait_for(name, lambda vm: vm.get("state") == "stopped" or "code" in vm)
        assert "code" not in made, made
        return made

    def run(self, name: str, **options: object) -> dict[str, Any]:
        """Run a VM and wait until QEMU is up."""
        self.call("POST", f"/vms/{name}/run", 202, json={"noDisplay": True, **options})
        return self.wait_for(name, lambda vm: vm["state"] == "running", 15)

    def boot(self, name: str, **options: object) -> dict[str, Any]:
        """Run a VM and wait until its guest answers."""
        self.run(name, **options)
        return self.wait_for(name, lambda vm: "ipAddress" in vm)

    def vm_dir(self, name: str) -> Path:
        """The folder of a VM in the default location."""
        return self.home / "vms" / name

    def read_disk(self, name: str, folder: Path) -> bytes:
        """All that a stopped VM's disk holds; folder is for a copy of it."""
        raw = folder / f"{name}.raw"
        disk = self.vm_dir(name) / "disk.qcow2"
        command = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(disk), str(raw)]
        subprocess.run(command, check=True)
        return raw.read_bytes()

    def machine_pid(self, name: str) -> int:
        """The pid of a VM's QEMU."""
        record = json.loads((self.vm_dir(name) / "run.json").read_text())
        return int(record["process"]["pid"])

    def wait_serial(self, name: str, text: str, timeout_s: float = BOOT_S) -> str:
        """Wait for a text on the guest's serial console; all of it until then."""
        log = self.vm_dir(name) / "serial.log"
        give_up_at = time.monotonic() + timeout_s
        while True:
            seen = log.read_text(errors="replace") if log.exists() else ""
            if text in seen:
                return seen
            assert time.monotonic() < give_up_at, f"no {text!r} in {seen!r}"
            time.sleep(0.05)

    def shell(self, name: str, command: str, timeout_s: float = 30.0) -> str:
        """Run a command in the guest's serial shell; what it printed."""
        record = json.loads((self.vm_dir(name) / "run.json").read_text())
        mark = os.urandom(4).hex()
        with socket.socket(socket.AF_UNIX) as serial:
            serial.settimeout(timeout_s)
            serial.connect(str(Path(record["runtime_dir"]) / "serial.sock"))
            # The marks are put together by the shell, so its echo of the line is not taken.
            line = f"echo {mark[:4]}''{mark[4:]}B; {command}; echo {mark[:4]}''{mark[4:]}E$?\n"
            serial.sendall(b"\n" + line.encode())
            seen = ""
            give_up_at = time.monotonic() + timeout_s
            while not re.search(rf"{mark}E\d+", seen):
                assert time.monotonic() < give_up_at, f"{command!r} did not end: {seen!r}"
                seen += serial.recv(65536).decode(errors="replace")
        return seen.split(f"{mark}B", 1)[1].split(f"{mark}E")[0].replace("\r", "").strip("\n")

    @contextlib.contextmanager
    def typing(self, line: str) -> Iterator[None]:
        """Type a line on the serial console of the only machine; it is held open meanwhile."""
        (path,) = self.home.glob("run/*/serial.sock")
        with socket.socket(socket.AF_UNIX) as serial:
            serial.connect(str(path))
            serial.sendall(b"\n" + line.encode() + b"\n")
            yield

    def end_machines(self) -> None:
        """Kill every machine of this home, for the end of a test."""
        for lock in self.home.glob("**/run.lock"):
            while is_locked(lock):
                pid = find_holder(lock)
                if pid is None:
                    break
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.02)


def run_lume(
    *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A `lume` command that ends by itself; whatever happens, it shows no traceback."""
    ended = subprocess.run(
        [*LUME, *arguments],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        env={**os.environ, **(env or {})},
        cwd="/",
    )
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended


def is_running(pid: int) -> bool:
    """Whether that process lives; one that only waits to be collected does not."""
    return find_process(pid) is not None


def get_line(address: str, port: int, timeout_s: float = 10) -> str:
    """What an HTTP server there answers."""
    return httpx.get(f"http://{address}:{port}/", timeout=timeout_s, verify=NO_TLS).text


@contextlib.contextmanager
def running_server(
    home: Path,
    cache: Path,
    *,
    start: bool = True,
    env: Mapping[str, str] | None = None,
    arguments: Sequence[str] = (),
) -> Iterator[Server]:
    """A server on a new home that uses a shared image cache; all of it gone at the end."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    (home / "config.yaml").write_text(f"cacheDirectory: {cache}\ndefaultImage: tiny\n")
    server = Server(home, env=env, arguments=arguments)
    try:
        if start:
            server.start()
        yield server
    finally:
        server.kill()
        server.end_machines()
