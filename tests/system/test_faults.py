"""A full disk, a missing QEMU, a lying guest: a clear answer, nothing lost."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.harness import SMALL, Server, running_server

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 MB."""
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "none", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=False)


def fill(directory: Path, leave_bytes: int) -> Path:
    """Take all but so many bytes of a file system."""
    filler = directory / "filler"
    usage = os.statvfs(directory)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, usage.f_bavail * usage.f_frsize - leave_bytes)
    return filler


@needs_root
def test_a_full_disk_refuses_create_and_run_and_loses_nothing(
    server: Server, small_disk: Path
) -> None:
    server.create("old", storage=str(small_disk))
    filler = fill(small_disk, 64 * 1024)
    reply = server.call(
        "POST", "/vms", 507, json={"name": "new", **SMALL, "storage": str(small_disk)}
    )
    assert reply["code"] == "no_space"
    assert "needs" in reply["message"]
    server.call("GET", "/vms/new", 404)
    assert server.call("POST", "/vms/old/run", 507)["code"] == "no_space"
    assert server.vm("old")["state"] == "stopped"
    filler.unlink()
    server.create("new", storage=str(small_disk))


@needs_root
def test_a_disk_that_fills_up_pauses_the_guest_and_it_goes_on_with_space(
    server: Server, small_disk: Path
) -> None:
    server.create("web", storage=str(small_disk))
    server.call("POST", "/vms/web/run", 202, json={"noDisplay": True})
    server.wait_for("web", lambda vm: "ipAddress" in vm)
    filler = fill(small_disk, 4 * 1024 * 1024)
    with server.typing("dd if=/dev/urandom of=/dev/vda bs=1M seek=200 count=16; sync"):
        vm = server.wait_for("web", lambda vm: vm["state"] == "paused", 30)
        assert "no space is left" in vm["problems"][-1]
        filler.unlink()
        vm = server.wait_for("web", lambda vm: vm["state"] == "running", 30)
        assert not vm.get("problems")
    server.call("POST", "/vms/web/stop", 200, json={"force": True})


def test_a_missing_qemu_is_told_with_the_line_that_mends_it(
    tmp_path: Path, image_cache: Path
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("qemu-img", "ssh-keygen", "apt-get", "apt-cache", "dpkg-deb", "dpkg"):
        found = shutil.which(name)
        if found:
            (tools / name).symlink_to(found)
    with running_server(tmp_path / "home", image_cache, env={"PATH": str(tools)}) as server:
        server.create("web", image=None)
        reply = server.call("POST", "/vms/web/run", 503)
        assert "qemu-system-x86_64 is not installed" in reply["message"]
        assert "apt-get install" in reply["hint"]
        assert server.vm("web")["state"] == "stopped"


def test_an_image_is_copied_and_its_source_may_go(server: Server, tmp_path: Path) -> None:
    source = tmp_path / "mine.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", source, "64M"], check=True)
    vm = server.create("web", image=str(source))
    assert vm["image"] == str(source)
    source.unlink()
    server.run("web")


def test_an_image_with_a_backing_file_is_refused(server: Server, tmp_path: Path) -> None:
    base, overlay = tmp_path / "base.qcow2", tmp_path / "overlay.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base, "64M"], check=True)
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay],
        check=True,
    )
    reply = server.call("POST", "/vms", 422, json={"name": "web", **SMALL, "image": str(overlay)})
    assert "backing file" in reply["fields"]["image"]
    assert server.call("GET", "/vms", 200) == []


def test_a_path_that_cannot_be_shared_is_named_before_the_run_is_accepted(
    server: Server, tmp_path: Path
) -> None:
    server.create("web", image=None)
    file = tmp_path / "file"
    file.touch()
    link = tmp_path / "link"
    link.symlink_to("/etc")
    for path in (tmp_path / "missing", file, link, Path("relative")):
        reply = server.call(
            "POST", "/vms/web/run", 422, json={"sharedDirectories": [{"hostPath": str(path)}]}
        )
        assert "hostPath" in str(reply["fields"]), reply
    reply = server.call("POST", "/vms/web/run", 422, json={"mount": str(tmp_path)})
    assert "no regular file" in reply["fields"]["mount"]
    assert server.vm("web")["state"] == "stopped"


def test_a_guest_reaches_nothing_on_the_hosts_loopback(server: Server) -> None:
    """An agent's guest must not be able to drive the API that made it."""
    server.create("web")
    server.boot("web")
    port = server.url.rsplit(":", 1)[1]

    def ask(address: str, port: str) -> str:
        request = f"GET /lume/vms HTTP/1.0\\r\\nHost: localhost:{port}\\r\\n\\r\\n"
        return server.shell("web", f"printf '{request}' | nc -w 3 {address} {port}", 60)

    # The way of asking is a good one: it gets an answer where there is a server.
    assert "lumed tiny" in ask("127.0.0.1", "8000")
    for address in ("10.0.2.2", "10.0.2.3", "127.0.0.1", "127.77.0.1", "0.0.0.0"):  # noqa: S104
        assert "locationName" not in ask(address, port), address
