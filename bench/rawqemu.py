"""The floor: QEMU started by hand with the arguments that lumed gave to its own."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

from bench.sampling import ms_since, wait_for_bytes, wait_for_end

_DESCRIPTOR = re.compile(r"\b(fd=|addr\.str=)(\d+)")


class RawQemu:
    """Starts and ends QEMU over copies of a stopped VM's disk and seed."""

    def __init__(self, lumed_argv: list[str], vm_dir: Path, directory: Path) -> None:
        self._argv = [part.replace(str(vm_dir), str(directory)) for part in lumed_argv]
        self._directory = directory
        self._serial = directory / "serial.log"
        directory.mkdir()
        for name in ("disk.qcow2", "seed.iso", "uefi-vars.qcow2"):
            if (vm_dir / name).exists():
                shutil.copy2(vm_dir / name, directory / name)

    def run_once(self) -> tuple[float, float]:
        """Milliseconds from the start to the first serial byte, and from `quit` to the end."""
        self._serial.unlink(missing_ok=True)
        with contextlib.ExitStack() as stack:
            argv, fds, monitor = self._open_sockets(stack)
            log = stack.enter_context((self._directory / "qemu.log").open("ab"))
            started = time.perf_counter()
            # In a session of its own, as lumed starts it: the scheduler may weigh sessions.
            qemu = subprocess.Popen(
                argv, pass_fds=fds, stdin=subprocess.DEVNULL, stderr=log, start_new_session=True
            )
            try:
                wait_for_bytes(self._serial)
                first_byte_ms = ms_since(started)
                return first_byte_ms, _quit(qemu.pid, monitor)
            finally:
                qemu.kill()
                qemu.wait()

    def _open_sockets(self, stack: contextlib.ExitStack) -> tuple[list[str], list[int], Path]:
        """The argv with descriptors of ours: listening sockets, and a network with no one in it."""
        argv: list[str] = []
        fds: list[int] = []
        monitor: Path | None = None
        for part in self._argv:
            found = _DESCRIPTOR.search(part)
            if found is None:
                argv.append(part)
                continue
            if found[1] == "fd=":
                end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                path = self._directory / f"{len(fds)}.sock"
                path.unlink(missing_ok=True)
                end.bind(str(path))
                end.listen(1)
                monitor = monitor or path  # the first chardev is the monitor
            else:
                end, other = socket.socketpair()
                stack.enter_context(other)
            stack.enter_context(end)
            fds.append(end.fileno())
            argv.append(_DESCRIPTOR.sub(rf"\g<1>{end.fileno()}", part))
        if monitor is None:
            raise RuntimeError(f"no monitor in {argv}")
        return argv, fds, monitor


def read_argv(pid: int) -> list[str]:
    """The command line of a process."""
    return Path(f"/proc/{pid}/cmdline").read_text().removesuffix("\0").split("\0")


def _quit(pid: int, monitor: Path) -> float:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as qmp:
        qmp.settimeout(10)
        qmp.connect(str(monitor))
        lines = qmp.makefile("rb")
        lines.readline()  # the greeting
        qmp.sendall(json.dumps({"execute": "qmp_capabilities"}).encode())
        lines.readline()
        started = time.perf_counter()
        qmp.sendall(json.dumps({"execute": "quit"}).encode())
        wait_for_end(pid)
        return ms_since(started)
