"""A VM's whole life through the API, on real QEMU with a real guest."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from lumed.guest.seed import Seed, make_seed
from tests.system.harness import Server, get_line, is_running, running_server


def test_a_guest_boots_answers_and_shuts_down_on_request(server: Server) -> None:
    server.create("web")
    vm = server.boot("web", vnc="enabled")
    port = next(f["port"] for f in vm["forwards"] if f["guestPort"] == 8000)
    assert get_line(vm["ipAddress"], port).startswith("lumed tiny web ")
    assert vm["ipAddress"].startswith("127.77.")
    assert "ready at" in server.wait_serial("web", "ready at")

    with server.client() as client:
        picture = client.get("/vms/web/screenshot")
    assert picture.headers["content-type"] == "image/png"
    assert picture.content.startswith(b"\x89PNG")

    started = time.monotonic()
    stopped = server.call("POST", "/vms/web/stop", 200)
    assert time.monotonic() - started < 20
    assert stopped["state"] == "stopped"
    assert stopped["lastEnd"]["step"] == "power-button"
    assert "powering off" in (server.vm_dir("web") / "serial.log").read_text(errors="replace")
    assert "ipAddress" not in stopped
    server.call("DELETE", "/vms/web", 200)
    assert not server.vm_dir("web").exists()


def test_cpu_memory_and_a_grown_disk_reach_the_guest(server: Server) -> None:
    server.create("web")
    server.call("PUT", "/vms/web", 200, json={"cpu": 2, "memory": "384MB", "diskSize": "2GB"})
    server.boot("web")
    assert server.shell("web", "grep -c ^processor /proc/cpuinfo") == "2"
    assert int(server.shell("web", "cat /sys/block/vda/size")) * 512 == 2 * 1024**3
    memory_kb = int(server.shell("web", "awk '/MemTotal/ {print $2}' /proc/meminfo"))
    assert 300_000 < memory_kb < 384 * 1024


def test_what_the_guest_writes_stays_and_never_reaches_the_image(server: Server) -> None:
    for name in ("one", "two"):
        server.create(name)
    server.boot("one")
    server.shell("one", "echo kept > /disk/note; sync")
    server.call("POST", "/vms/one/stop", 200)
    server.boot("one")
    assert server.shell("one", "cat /disk/note") == "kept"
    server.boot("two")
    assert "No such file" in server.shell("two", "cat /disk/note")


def test_machines_have_addresses_of_their_own(server: Server) -> None:
    for name in ("one", "two"):
        server.create(name)
    first, second = (server.boot(name) for name in ("one", "two"))
    assert first["ipAddress"] != second["ipAddress"]
    for name, vm in (("one", first), ("two", second)):
        port = next(f["port"] for f in vm["forwards"] if f["guestPort"] == 8000)
        assert f" {name} " in get_line(vm["ipAddress"], port)


def test_ports_are_forwarded_as_asked(server: Server) -> None:
    server.create("web", ports=[{"guestPort": 8000, "hostPort": 18000}])
    vm = server.boot("web")
    assert get_line(vm["ipAddress"], 18000).startswith("lumed tiny")


def test_a_guest_that_powers_itself_off_is_stopped(server: Server) -> None:
    server.create("web")
    server.boot("web")
    # The shell goes away in the middle of the answer.
    with contextlib.suppress(AssertionError, ConnectionError, TimeoutError):
        server.shell("web", "poweroff", timeout_s=5)
    vm = server.wait_for("web", lambda vm: vm["state"] == "stopped", 15)
    assert vm["lastEnd"]["cause"] == "guest-shutdown"


def test_a_guest_that_restarts_is_found_again(server: Server) -> None:
    server.create("web")
    vm = server.boot("web")
    pid = server.machine_pid("web")
    with contextlib.suppress(AssertionError, ConnectionError, TimeoutError):
        server.shell("web", "reboot", timeout_s=5)
    server.wait_for("web", lambda vm: "ipAddress" not in vm, 20)
    again = server.wait_for("web", lambda vm: "ipAddress" in vm)
    assert again["ipAddress"] == vm["ipAddress"]
    assert server.machine_pid("web") == pid


@pytest.mark.parametrize("read_only", [False, True])
def test_a_shared_directory_is_mounted_by_itself(
    server: Server, tmp_path: Path, read_only: bool
) -> None:
    share = tmp_path / "docs, mine"
    share.mkdir()
    (share / "hello").write_text("from the host\n")
    server.create("web")
    vm = server.boot("web", sharedDirectories=[{"hostPath": str(share), "readOnly": read_only}])
    assert vm["sharedDirectories"][0]["hostPath"] == str(share)
    tag = vm["sharedDirectories"][0]["tag"]
    server.wait_serial("web", f"lumed: mounted {tag} at ")
    mounted = server.shell("web", "ls -d /mnt/shared/*").strip()
    assert server.shell("web", f"cat '{mounted}/hello'") == "from the host"
    server.shell("web", f"echo guest > '{mounted}/reply'; sync")
    assert (share / "reply").exists() is not read_only


def test_disks_of_the_host_are_attached(server: Server, tmp_path: Path) -> None:
    raw, qcow2, stick = tmp_path / "a.img", tmp_path / "b.qcow2", tmp_path / "stick.img"
    for path, size in ((raw, 3 << 20), (stick, 5 << 20)):
        with path.open("wb") as file:
            file.truncate(size)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", qcow2, "7M"], check=True)
    server.create("web")
    disks = {"disks": [str(raw), str(qcow2)], "usbStorage": [str(stick)]}
    vm = server.boot("web", **disks)
    assert vm.items() >= disks.items()
    sizes = [server.shell("web", f"cat /sys/block/vd{letter}/size") for letter in "bc"]
    assert sizes == [str((3 << 20) // 512), str((7 << 20) // 512)]
    server.shell("web", "echo from the guest > /dev/vdb; sync")
    assert raw.read_bytes().startswith(b"from the guest\n")
    server.create("other")
    refused = server.call("POST", "/vms/other/run", 409, json=disks)
    assert refused["message"] == f"{raw} is the disk of a machine that runs"
    # Several may read.
    server.run("other", usbStorage=[str(stick)])
    server.call("POST", "/vms/web/stop", 200)
    assert "disks" not in server.vm("web")


def test_recovery_boots_a_rescue_system_with_the_disk_attached(server: Server) -> None:
    server.create("web")
    vm = server.run("web", recoveryMode=True)
    assert vm["recoveryMode"] is True
    assert "/dev/vda" in server.wait_serial("web", "lumed rescue")
    server.call("POST", "/vms/web/stop", 200)


def test_uefi_boots_the_same_image(server: Server) -> None:
    vm = server.create("web", firmware="uefi")
    assert vm["firmware"] == "uefi"
    server.boot("web")
    assert (server.vm_dir("web") / "uefi-vars.qcow2").exists()


def test_a_forced_stop_and_a_delete_need_no_guest(server: Server) -> None:
    server.create("web", image=None)
    vm = server.run("web")
    assert "no installer" in vm["problems"][0]
    stopped = server.call("POST", "/vms/web/stop", 200, json={"force": True})
    assert stopped["lastEnd"]["step"] == "quit"
    server.run("web")
    pid = server.machine_pid("web")
    server.call("DELETE", "/vms/web", 200)
    assert not is_running(pid)


def test_the_screen_needs_its_password(server: Server) -> None:
    server.create("web")
    vm = server.run("web")
    password = vm["vncUrl"].removeprefix("vnc://:").partition("@")[0]
    assert len(password) == 8
    assert vm["vncUrl"].endswith(f":{vm['vncPort']}")
    with socket.create_connection(("127.0.0.1", vm["vncPort"]), 5) as vnc:
        version = vnc.recv(12)
        vnc.sendall(version)
        count = vnc.recv(1)[0]
        # RFC 6143, 7.1.2: security type 2 is VNC authentication, 1 would be none.
        assert vnc.recv(count) == b"\x02"
    argv = Path(f"/proc/{server.machine_pid('web')}/cmdline").read_bytes()
    assert password.encode() not in argv
    for log in (*server.home.glob("logs/*"), *server.vm_dir("web").glob("*.log")):
        assert password not in log.read_text(errors="replace"), log
    server.call("POST", "/vms/web/stop", 200, json={"force": True})
    assert password not in server.run("web")["vncUrl"]


def test_every_socket_is_private(server: Server) -> None:
    server.create("web")
    server.run("web")
    sockets = [path for path in (server.home / "run").rglob("*") if path.is_socket()]
    assert len(sockets) == 5
    for path in sockets:
        assert path.stat().st_mode & 0o777 == 0o600, path
        assert path.parent.stat().st_mode & 0o777 == 0o700, path


def test_a_killed_machine_is_a_crash_with_its_cause(server: Server) -> None:
    server.create("web")
    server.run("web")
    os.kill(server.machine_pid("web"), signal.SIGKILL)
    vm = server.wait_for("web", lambda vm: vm["state"] == "crashed", 5)
    assert vm["lastEnd"]["detail"] == "QEMU was killed by signal 9"
    server.boot("web")


def test_a_stopped_process_is_unresponsive_until_it_goes_on(server: Server) -> None:
    server.create("web")
    server.run("web")
    pid = server.machine_pid("web")
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    server.wait_for("web", lambda vm: vm["state"] == "unresponsive", 10)
    assert time.monotonic() - started < 10
    os.kill(pid, signal.SIGCONT)
    server.wait_for("web", lambda vm: vm["state"] == "running", 10)
    os.kill(pid, signal.SIGSTOP)
    server.wait_for("web", lambda vm: vm["state"] == "unresponsive", 10)
    stopped = server.call("POST", "/vms/web/stop", 200)
    assert stopped["lastEnd"]["step"] == "sigkill"


def test_a_viewer_opens_where_the_server_has_a_desktop(tmp_path: Path, image_cache: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    viewer = tools / "remote-viewer"
    shown = tmp_path / "shown"
    viewer.write_text(
        f'#!/bin/sh\necho "$@" > {shown}.new; cat >> {shown}.new; mv {shown}.new {shown}\n'
    )
    viewer.chmod(0o755)
    env = {"DISPLAY": ":99", "PATH": f"{tools}:{os.environ['PATH']}"}
    with running_server(tmp_path / "home", image_cache, env=env) as server:
        server.create("web", image=None)
        server.run("web", noDisplay=True)
        server.call("POST", "/vms/web/stop", 200, json={"force": True})
        assert not shown.exists()
        vm = server.run("web", noDisplay=False)
        give_up_at = time.monotonic() + 10
        while not shown.exists():
            assert time.monotonic() < give_up_at
            time.sleep(0.02)
        argv, *settings = shown.read_text().splitlines()
        assert argv == "-"
        assert f"port={vm['vncPort']}" in settings
        assert f"password={vm['vncUrl'].split(':')[2].partition('@')[0]}" in settings


def test_an_iso_is_attached_and_an_empty_disk_then_has_an_installer(
    server: Server, tmp_path: Path
) -> None:
    iso = tmp_path / "installer.iso"
    iso.write_bytes(make_seed(Seed("i", "h")))
    server.create("web")
    server.boot("web", mount=str(iso))
    # Debian's cloud kernel has no driver for it; that QEMU has it is seen from outside.
    argv = Path(f"/proc/{server.machine_pid('web')}/cmdline").read_bytes()
    assert str(iso).encode() in argv
    server.create("blank", image=None)
    assert "problems" not in server.run("blank", mount=str(iso))


def test_a_guest_that_does_not_listen_is_off_within_20_seconds(server: Server) -> None:
    server.create("deaf", image=None)
    server.run("deaf")
    started = time.monotonic()
    stopped = server.call("POST", "/vms/deaf/stop", 200)
    assert time.monotonic() - started < 20
    assert stopped["lastEnd"]["step"] == "quit"
