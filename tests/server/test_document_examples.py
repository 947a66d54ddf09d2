"""The API document's examples, run as it prints them, by the clients that it prints them for.

`document_examples/` holds them letter by letter; only the create example for Node is corrected
(`methdo`, and a missing comma).
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.harness import Server

EXAMPLES = Path(__file__).parent / "document_examples"
RUNNERS = {
    "curl": ("bash", "-c"),
    "python": (sys.executable, "-c"),
    "node": ("node", "--input-type=module", "-e"),
}
PORT = 7777


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.fixture
def server(tmp_path: Path, image_cache: Path) -> Iterator[Server]:
    """On the document's port if nobody else has it, with a home directory that has Projects."""
    (tmp_path / "Projects").mkdir()
    home = tmp_path / ".lume"
    home.mkdir()
    (home / "config.yaml").write_text(f"cacheDirectory: {image_cache}\ndefaultImage: tiny\n")
    port = PORT if is_free(PORT) else 0
    server = Server(home, port=port, env={"HOME": str(tmp_path)})
    try:
        server.start()
        yield server
    finally:
        server.kill()
        server.end_machines()


def run_example(server: Server, step: str, language: str, *changes: tuple[str, str]) -> str:
    """Run an example; what it printed. changes are made to its text first."""
    text = (EXAMPLES / f"{step}.{language}").read_text()
    if not server.url.endswith(f":{PORT}"):
        text = text.replace(f"http://localhost:{PORT}", server.url)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    ended = subprocess.run(
        [*RUNNERS[language], text], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("language", RUNNERS)
def test_the_documents_examples_do_what_it_says(server: Server, language: str) -> None:
    def example(step: str, *changes: tuple[str, str]) -> str:
        return run_example(server, step, language, *changes)

    # A macOS guest needs Apple's hardware: refused with that reason, and nothing is made.
    said = example("create")
    assert "not_possible_here" in said
    assert "Apple hardware" in said
    assert server.call("GET", "/vms", 200) == []

    said = example("create", ('"macOS"', '"linux"'))
    assert "provisioning" in said
    vm = server.wait_for("lume_vm", lambda vm: vm["state"] == "stopped")
    assert (vm["os"], vm["cpu"], vm["memory"], vm["diskSize"]) == ("linux", 2, "4GB", "64GB")
    assert (vm["display"], vm["locationName"], vm["image"]) == ("1024x768", "ssd", "tiny")
    # The run example has a second VM.
    server.create("my-vm-name")

    said = example("list")
    assert "lume_vm" in said
    assert "my-vm-name" in said
    assert "error" not in said
    said = example("get")
    assert said.count("lume_vm") >= 2
    assert "error" not in said

    assert "error" not in example("update")
    vm = server.vm("lume_vm")
    assert (vm["cpu"], vm["memory"], vm["diskSize"]) == (4, "8GB", "100GB")
    assert vm["display"] == "1920x1080"
    # Four processors in software emulation would only make the guest slow to start.
    server.call("PUT", "/vms/lume_vm", 200, json={"cpu": 1})

    said = example("run")
    assert said.count("VM start initiated") == 2
    server.call("POST", "/vms/my-vm-name/stop", 200, json={"force": True})
    vm = server.wait_for("lume_vm", lambda vm: "ipAddress" in vm)
    assert vm["sharedDirectories"] == [
        {
            "hostPath": str(server.home.parent / "Projects"),
            "readOnly": False,
            "tag": "com.apple.virtio-fs.automount",
        }
    ]
    said = example("get")
    assert said.count(vm["ipAddress"]) >= 2
    assert said.count(str(vm["vncPort"])) >= 2

    assert "VM stopped successfully" in example("stop")
    assert server.vm("lume_vm")["state"] == "stopped"

    # The second of its two deletes finds nothing any more.
    said = example("delete")
    if language == "curl":
        assert "VM deleted successfully" in said
        assert "Virtual machine not found: lume_vm" in said
    else:
        assert said.split() == ["200", "404"]
    server.call("DELETE", "/vms/my-vm-name", 200)
    assert server.call("GET", "/vms", 200) == []
