"""`lume push`, `pull`, `run` and `convert` against a real registry, in a terminal and without."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.lume import Lume
from tests.cli.terminal import run_in_terminal
from tests.registry.faults import FaultProxy
from tests.registry.world import RunningRegistry
from tests.system.harness import Server, running_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a cache of its own and a VM with some data."""
    folder = tmp_path_factory.mktemp("commands")
    image = folder / "data.raw"
    with image.open("wb") as file:
        file.write(bytes(range(256)) * 16384)
        file.truncate(64 << 20)
    with running_server(folder / "home", folder / "home" / "cache") as server:
        server.create("data", image=str(image), diskSize="64MB")
        yield server


@pytest.fixture
def lume(server: Server) -> Lume:
    """Commands for that home."""
    return Lume(server.home)


def test_what_is_pushed_can_be_pulled_run_and_converted(
    lume: Lume, server: Server, registry: RunningRegistry, tmp_path: Path
) -> None:
    there = ("--registry", registry.host, "--organization", "team")
    pushed = lume.run("push", "data", "data:1", *there, "--additional-tags", "latest", "new")
    assert pushed.stdout.startswith("sha256:")
    assert pushed.stderr == "data is pushed as data:1\n"
    pulled = lume.run("pull", "data:latest", "again", *there)
    assert pulled.stdout == ""
    assert pulled.stderr == "again is made from data:latest; start it: lume run again\n"
    assert server.read_disk("again", tmp_path) == server.read_disk("data", tmp_path)
    said = lume.run("pull", "data:1", "again", *there, status=1).stderr
    assert "again" in said
    lume("pull", "data:1", "again", *there, "--force")

    # What is missing is pulled; its name is as Lume makes it.
    lume("run", "data:new", *there, "--detach", "--network", "none")
    assert server.vm("data_new")["state"] == "running"
    lume("stop", "data_new", "--force")

    converted = lume.run(
        "convert", "data:1", "data:disk", *there, "--image-format", "containerdisk"
    )
    assert converted.stderr == "data:1 is pushed as data:disk\n"
    copy = ["skopeo", "inspect", "--tls-verify=false", f"docker://{registry.host}/team/data:disk"]
    assert subprocess.run(copy, capture_output=True, check=False).returncode == 0
    names = {vm["name"] for vm in server.call("GET", "/vms", 200)}
    assert names == {"data", "again", "data_new"}
    for name in ("again", "data_new"):
        lume("delete", name, "--force")


def test_a_pull_shows_how_far_it_is_in_a_terminal_only(
    lume: Lume, server: Server, registry: RunningRegistry, proxy: FaultProxy
) -> None:
    here = ("--registry", proxy.host, "--organization", "team")
    lume("push", "data", "shown:1", "--registry", registry.host, "--organization", "team")
    lume("prune")
    shown = run_in_terminal(lume, "pull", "shown:1", "shown", *here, columns=100)
    assert "pull shown: " in shown
    assert "shown is made from shown:1" in shown
    lume("delete", "shown", "--force")


def test_ctrl_c_ends_a_pull_and_frees_its_name(
    lume: Lume, server: Server, registry: RunningRegistry, proxy: FaultProxy
) -> None:
    lume("push", "data", "held:1", "--registry", registry.host, "--organization", "team")
    lume("prune")
    go_on = threading.Event()
    proxy.hold("/blobs/", go_on)
    command = ("pull", "held:1", "--registry", proxy.host, "--organization", "team")
    try:
        with lume.start(*command) as pulling:
            assert proxy.noticed.wait(30)
            pulling.send_signal(signal.SIGINT)
            _, said = pulling.communicate(timeout=60)
    finally:
        go_on.set()
    assert pulling.returncode == 130
    assert said == "lume: cancelling\n"
    assert [vm["name"] for vm in server.call("GET", "/vms", 200)] == ["data"]
