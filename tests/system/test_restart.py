"""Machines outlive the server, whenever and however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from lumed.claim import is_locked
from lumed.machine.qemu.driver import MONITOR
from tests.system.harness import (
    NO_TLS,
    SMALL,
    Server,
    is_running,
    run_lume,
    running_server,
)

# Contract, section 2: what stays the same for a client when the server was restarted.
_SAME = ("ipAddress", "vncUrl", "forwards", "sharedDirectories", "startedAt", "networkMode", "uuid")


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_a_running_vm_is_there_again_with_the_same_process_address_and_options(
    server: Server, tmp_path: Path, end: str
) -> None:
    share = tmp_path / "share"
    share.mkdir()
    server.create("web")
    before = server.boot("web", sharedDirectories=[{"hostPath": str(share), "readOnly": True}])
    pid = server.machine_pid("web")
    server.kill() if end == "kill" else server.stop()
    assert is_running(pid)
    server.start()
    after = server.wait_for("web", lambda vm: "ipAddress" in vm, 20)
    assert after["state"] == "running"
    assert {key: after[key] for key in _SAME} == {key: before[key] for key in _SAME}
    assert server.machine_pid("web") == pid
    assert server.shell("web", "hostname") == "web"
    stopped = server.call("POST", "/vms/web/stop", 200)
    assert stopped["lastEnd"]["step"] == "power-button"
    assert not is_running(pid)


def test_a_machine_that_ends_while_no_server_watches_is_stopped_at_the_next_start(
    server: Server,
) -> None:
    server.create("web")
    server.run("web")
    pid = server.machine_pid("web")
    server.kill()
    os.kill(pid, signal.SIGTERM)
    while is_locked(server.vm_dir("web") / "run.lock"):
        time.sleep(0.01)
    server.start()
    vm = server.vm("web")
    assert vm["state"] == "crashed"
    assert "signal from outside" in vm["lastEnd"]["detail"]
    server.run("web")


@pytest.mark.parametrize("is_queue_full", [False, True])
def test_a_silent_machine_does_not_keep_the_server_from_starting(
    server: Server, is_queue_full: bool
) -> None:
    server.create("web")
    server.create("other")
    server.run("web")
    pid = server.machine_pid("web")
    server.kill()
    os.kill(pid, signal.SIGSTOP)
    if is_queue_full:
        # As after some servers more: QEMU has not listened to them yet.
        record = json.loads((server.vm_dir("web") / "run.json").read_text())
        _fill_queue(Path(record["runtime_dir"]) / MONITOR)
    started = time.monotonic()
    server.start()
    assert time.monotonic() - started < 8
    assert server.vm("web")["state"] == "unresponsive"
    assert server.vm("other")["state"] == "stopped"
    os.kill(pid, signal.SIGCONT)
    server.wait_for("web", lambda vm: vm["state"] == "running", 10)


def _fill_queue(path: Path) -> None:
    """Connect to a socket whose process sleeps until it takes no more, and hang up."""
    with contextlib.ExitStack() as stack, contextlib.suppress(BlockingIOError):
        while True:
            caller = stack.enter_context(socket.socket(socket.AF_UNIX))
            caller.setblocking(False)
            caller.connect(str(path))


def test_a_machine_without_its_record_is_still_found_and_stopped(server: Server) -> None:
    server.create("web")
    server.run("web")
    pid = server.machine_pid("web")
    server.kill()
    (server.vm_dir("web") / "run.json").write_text("{ torn")
    server.start()
    vm = server.wait_for("web", lambda vm: vm["state"] == "running", 10)
    assert "run record was lost" in vm["problems"][0]
    server.call("POST", "/vms/web/stop", 200, json={"force": True})
    assert not is_running(pid)


def test_the_second_server_of_a_home_says_where_the_first_listens(server: Server) -> None:
    second = run_lume("serve", "--port", "0", "--home", str(server.home))
    assert second.returncode == 1
    assert server.url in second.stderr


class Torture:
    """Random actions on one VM, a SIGKILL at a random moment of each, and what must hold then."""

    def __init__(self, server: Server, seed: int, victim: dict[str, Any]) -> None:
        self.server = server
        self.victim = {"name": "victim", **victim}
        self.random = random.Random(seed)  # noqa: S311
        self.done: dict[str, int] = {}

    def hit(self) -> None:
        """One action and one kill; the server is down afterwards."""
        vms = {vm["name"]: vm for vm in self.server.call("GET", "/vms", 200)}
        vm = vms.get("victim")
        if vm is None and self.random.random() < 0.7:
            # On a busy machine hardly a create ends before its kill, and nothing else would be.
            vm = self.server.create(**self.victim)
        action, method, path, body = self._choose(vm)
        self.done[action] = self.done.get(action, 0) + 1
        url = f"{self.server.url}/lume{path}"

        def send() -> None:
            with contextlib.suppress(httpx.HTTPError):
                httpx.request(method, url, json=body, timeout=20, verify=NO_TLS)

        sender = threading.Thread(target=send)
        sender.start()
        # Most of what an action does happens in its first 100 ms.
        time.sleep(self.random.random() ** 2 * 0.25)
        self.server.kill()
        sender.join()

    def _choose(self, vm: dict[str, Any] | None) -> tuple[str, str, str, object]:
        if vm is None:
            return "create", "POST", "/vms", self.victim
        actions: list[tuple[str, str, str, object]]
        if vm["state"] in ("running", "starting"):
            actions = [("stop", "POST", "/vms/victim/stop", {"force": True})]
        else:
            actions = [("run", "POST", "/vms/victim/run", {"noDisplay": True})] * 3
            actions.append(("update", "PUT", "/vms/victim", {"cpu": self.random.randint(1, 4)}))
        actions.append(("delete", "DELETE", "/vms/victim", None))
        return self.random.choice(actions)

    def check(self, bystander: dict[str, Any]) -> None:
        """The server is up again: nothing is lost, half made, or left over."""
        server = self.server
        for vm in server.call("GET", "/vms", 200):
            directory = server.vm_dir(vm["name"])
            held = is_locked(directory / "run.lock")
            assert vm["state"] in ("stopped", "running", "crashed"), vm
            assert (vm["state"] == "running") == held, (vm, held)
            if held:
                assert is_running(server.machine_pid(vm["name"]))
            else:
                assert not (directory / "run.json").exists(), vm
        assert server.vm("bystander")["startedAt"] == bystander["startedAt"]
        operations = server.call("GET", "/operations", 200)
        assert all(op["status"] != "running" for op in operations), operations
        leftovers = [*server.home.glob("vms/.staging/*"), *server.home.glob("vms/.trash/*")]
        assert leftovers == []
        folders = {p.name for p in (server.home / "run").iterdir() if p.is_dir()}
        assert len(folders) == sum(
            vm["state"] == "running" for vm in server.call("GET", "/vms", 200)
        )


def torture(
    home: Path, cache: Path, hits: int, seed: int, give_way: Callable[[], None]
) -> dict[str, int]:
    """So many kills on a home of their own; how many of each action there were."""
    blank = home.with_suffix(".qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", blank, "64M"], check=True)
    # Nothing boots from it: guests that each new server asks anew would cost more than the servers.
    machine = {**SMALL, "image": str(blank), "firmware": "bios"}
    with running_server(home, cache) as server:
        server.create("bystander", **machine)
        bystander = server.run("bystander")
        pid = server.machine_pid("bystander")
        torture = Torture(server, seed, machine)
        for _ in range(hits):
            torture.hit()
            give_way()
            server.start()
            torture.check(bystander)
        assert server.machine_pid("bystander") == pid
        assert is_running(pid)
        return torture.done


@pytest.mark.timeout(900)
def test_a_server_killed_at_any_moment_leaves_nothing_half_done(
    tmp_path: Path, image_cache: Path, give_way: Callable[[], None]
) -> None:
    hits = int(os.environ.get("LUMED_KILLS", "200"))
    seed = int(os.environ.get("LUMED_SEED", str(os.getpid())))
    print(f"LUMED_SEED={seed}")
    print(json.dumps(torture(tmp_path / "home", image_cache, hits, seed, give_way)))
