"""Plain QEMU for tests, without any of lumed: serial, monitor and agent over socket pairs.

All waits have a deadline; leaving the context kills the machine whatever happened.
"""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


class JsonLine:
    """Commands and answers of QMP or the guest agent, one JSON object a line."""

    def __init__(self, channel: socket.socket) -> None:
        self._file = channel.makefile("rwb")
        self._channel = channel

    def read(self, timeout_s: float) -> dict[str, Any]:
        self._channel.settimeout(timeout_s)
        line = self._file.readline()
        if not line:
            raise ConnectionError("the other end closed")
        answer: dict[str, Any] = json.loads(line.lstrip(b"\xff"))
        return answer

    def send(self, command: str, **arguments: object) -> None:
        request = (
            {"execute": command, "arguments": arguments} if arguments else {"execute": command}
        )
        self._file.write(json.dumps(request).encode() + b"\n")
        self._file.flush()

    def ask(self, command: str, *, timeout_s: float = 10, **arguments: object) -> Any:
        self.send(command, **arguments)
        while True:
            answer = self.read(timeout_s)
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise AssertionError(f"{command}: {answer['error']}")

    def close(self) -> None:
        # The channel goes last: closing the file flushes into it.
        with contextlib.suppress(OSError):
            self._file.close()
        self._channel.close()


class RawQemu:
    """A running machine; times are seconds since its process was started."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        serial: socket.socket,
        monitor: JsonLine,
        agent: JsonLine,
    ) -> None:
        self.process = process
        self.monitor = monitor
        self.agent = agent
        self.started_at = time.monotonic()
        self.first_byte_s: float | None = None
        self._serial = serial
        self._seen = bytearray()
        self._ended = False
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read_serial, daemon=True)
        self._reader.start()

    def _read_serial(self) -> None:
        while True:
            try:
                part = self._serial.recv(65536)
            except OSError:
                part = b""
            with self._more:
                if part and self.first_byte_s is None:
                    self.first_byte_s = self.elapsed_s()
                self._seen += part
                self._ended = not part
                self._more.notify_all()
            if not part:
                return

    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_at

    @property
    def serial(self) -> str:
        with self._more:
            return self._seen.decode(errors="replace")

    def type_line(self, text: str) -> None:
        self._serial.sendall(text.encode() + b"\n")

    def wait_serial(self, text: str, timeout_s: float = 60, *, times: int = 1) -> float:
        """Wait until `text` was printed, so many times; returns when that was."""
        with self._more:

            def seen() -> bool:
                return self._seen.count(text.encode()) >= times

            self._more.wait_for(lambda: seen() or self._ended, timeout_s)
            assert seen(), f"{text!r} not seen within {timeout_s} s; serial:\n{self._tail()}"
            return self.elapsed_s()

    def _tail(self) -> str:
        return self._seen[-3000:].decode(errors="replace")

    def ask_agent(self, command: str, *, timeout_s: float = 30, **arguments: object) -> Any:
        return self.agent.ask(command, timeout_s=timeout_s, **arguments)

    def run_in_guest(self, script: str, timeout_s: float = 30) -> str:
        """Run a shell line through the agent; returns its standard output."""
        pid = self.ask_agent(
            "guest-exec", path="/bin/sh", arg=["-c", script], **{"capture-output": True}
        )["pid"]
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            status = self.ask_agent("guest-exec-status", pid=pid)
            if status["exited"]:
                return base64.b64decode(status.get("out-data", "")).decode()
        raise AssertionError(f"{script!r} did not end in {timeout_s} s")

    def wait_end(self, timeout_s: float = 30) -> int:
        return self.process.wait(timeout_s)


@contextlib.contextmanager
def start_qemu(
    *arguments: str | Path, log: Path, memory_mib: int = 256, pass_fds: Sequence[int] = ()
) -> Iterator[RawQemu]:
    """A q35 machine under software emulation with one serial port, a monitor and an agent port."""
    with contextlib.ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(3)]
        for ours, theirs in pairs:
            stack.callback(ours.close)
            stack.callback(theirs.close)
        fds = [theirs.fileno() for _, theirs in pairs]
        output = stack.enter_context(log.open("wb"))
        process = subprocess.Popen(
            [
                "qemu-system-x86_64",
                *("-nodefaults", "-display", "none", "-machine", "q35", "-accel", "tcg"),
                *("-cpu", "max", "-smp", "1", "-m", str(memory_mib)),
                *("-chardev", f"socket,id=serial,fd={fds[0]}", "-serial", "chardev:serial"),
                *("-chardev", f"socket,id=mon,fd={fds[1]}", "-mon", "chardev=mon,mode=control"),
                *("-device", "virtio-serial-pci", "-chardev", f"socket,id=qga,fd={fds[2]}"),
                *("-device", "virtserialport,chardev=qga,name=org.qemu.guest_agent.0"),
                *map(str, arguments),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[*fds, *pass_fds],
        )
        stack.callback(process.wait, 10)
        stack.callback(process.kill)
        for _, theirs in pairs:
            theirs.close()
        serial, monitor, agent = (ours for ours, _ in pairs)
        mon, qga = JsonLine(monitor), JsonLine(agent)
        stack.callback(mon.close)
        stack.callback(qga.close)
        machine = RawQemu(process, serial, mon, qga)
        try:
            assert "QMP" in mon.read(20)
            mon.ask("qmp_capabilities")
        except ConnectionError:
            process.wait(10)
            raise AssertionError(f"QEMU did not start: {log.read_text()}") from None
        yield machine


def wait_answer(address: str, port: int, timeout_s: float = 60) -> str:
    """The body that the guest's HTTP port answers with; tries again until it does."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with socket.create_connection((address, port), timeout=10) as client:
                client.sendall(b"GET / HTTP/1.0\r\n\r\n")
                with client.makefile("rb") as answer:
                    head, _, body = answer.read().decode().partition("\r\n\r\n")
            if head.startswith("HTTP/1.0 200"):
                return body
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise AssertionError(f"{address}:{port} did not answer within {timeout_s} s")
        threading.Event().wait(0.02)


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
