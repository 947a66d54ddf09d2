"""Watching a real guest: nobody asks for anything, and all of it comes."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx2 as httpx

from tests.system.harness import BOOT_S, NO_TLS, Server


class Watcher:
    """Reads a stream of a server in a thread of its own, until the server ends."""

    def __init__(self, server: Server, path: str) -> None:
        self._url = f"{server.url}/lume{path}"
        self._news = threading.Condition()
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with (
            httpx.Client(timeout=BOOT_S, verify=NO_TLS) as client,
            client.stream("GET", self._url) as reply,
        ):
            for line in reply.iter_lines():
                with self._news:
                    self.lines.append(line)
                    self._news.notify_all()

    def vms(self) -> list[dict[str, Any]]:
        """The VMs of all events so far."""
        kinds = zip(self.lines, self.lines[1:], strict=False)
        return [json.loads(data[6:]) for kind, data in kinds if kind == "event: vm"]

    def wait_for_vm(self, **facts: object) -> dict[str, Any]:
        """The first event that has these facts, None for those that are there at all."""

        def found() -> dict[str, Any] | None:
            return next((vm for vm in self.vms() if _has(vm, facts)), None)

        with self._news:
            assert self._news.wait_for(found, BOOT_S), self.lines
        vm = found()
        assert vm is not None
        return vm

    def wait_for_line(self, text: str) -> None:
        """Wait for a line that holds a text."""
        with self._news:
            assert self._news.wait_for(lambda: any(text in line for line in self.lines), BOOT_S)

    def join(self) -> None:
        """Wait for the end of the stream."""
        self._thread.join(10)
        assert not self._thread.is_alive()


def _has(vm: dict[str, Any], facts: dict[str, object]) -> bool:
    return all(key in vm and value in (None, vm[key]) for key, value in facts.items())


def test_a_guests_life_is_told_and_its_console_followed_without_a_question(
    server: Server,
) -> None:
    server.create("web")
    events, console = Watcher(server, "/events?vm=web"), Watcher(server, "/vms/web/logs?follow=1")
    server.call("POST", "/vms/web/run", 202, json={"noDisplay": True})
    address = events.wait_for_vm(state="running", ipAddress=None)["ipAddress"]
    assert address.startswith("127.77.")
    console.wait_for_line("ready at")
    assert events.vms()[-1]["sshAvailable"] is False
    # After the guest was ready, and nobody looks at the VM.
    with server.typing("(echo SSH-2.0-late; sleep 60) | nc -l -p 22 -w 60 &"):
        events.wait_for_vm(state="running", sshAvailable=True)
    with server.typing("poweroff"):
        ended = events.wait_for_vm(state="stopped", lastEnd=None)
    assert ended["lastEnd"]["cause"] == "guest-shutdown"
    states = [vm["state"] for vm in events.vms()]
    assert set(states[states.index("starting") : states.index("stopped")]) == {
        "starting",
        "running",
    }
    server.call("POST", "/vms/web/run", 202, json={"noDisplay": True})
    server.call("DELETE", "/vms/web", 200)
    console.join()
    events.wait_for_line("event: vm-deleted")
    server.stop()
    events.join()
