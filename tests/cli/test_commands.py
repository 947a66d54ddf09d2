"""`lume` commands as processes, over a real server with real guests."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
import yaml

from lumed.cli.app import Commands, build_cli
from tests.cli.lume import Lume
from tests.cli.terminal import run_in_terminal
from tests.system.harness import Server, is_running, running_server

TINY = ("--image", "tiny", "--cpu", "1", "--memory", "256MB", "--disk-size", "1GB")


def test_attached_disks_and_a_vnc_port_stay_over_a_restart(
    lume: Lume, server: Server, tmp_path: Path
) -> None:
    lume("create", "web", *TINY)
    (tmp_path / "a.img").write_bytes(bytes(1 << 20))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    disk = str(tmp_path / "a.img")
    options = ("--disk", disk, "--vnc-port", str(port), "--vnc-password", "sesame12")
    lume("run", "web", *options, "--detach")
    vm = server.vm("web")
    assert vm["vncUrl"] == f"vnc://:sesame12@127.0.0.1:{port}"
    lume("restart", "web")
    assert server.vm("web")["disks"] == vm["disks"] == [disk]
    refused = lume.run("run", "web", "--nvram-path", "x", status=1)
    assert "--nvram-path is not possible" in refused.stderr
    lume("delete", "web", "--force")


def test_a_machines_life_by_commands(lume: Lume, server: Server, tmp_path: Path) -> None:
    made = lume.run("create", "web", *TINY)
    assert made.stdout == ""
    assert made.stderr == "web is created; start it: lume run web\n"
    (tmp_path / "note").write_text("hello")
    address = lume("run", "web", "--wait", "ip", "--shared-dir", f"{tmp_path}:ro").strip()
    vm = server.vm("web")
    assert address == vm["ipAddress"]
    assert vm["sharedDirectories"][0]["readOnly"] is True

    assert json.loads(lume("ls", "--format", "json")) == [server.vm("web")]
    assert json.loads(lume("get", "web", "-f", "json")) == [server.vm("web")]
    assert yaml.safe_load(lume("get", "web", "--format", "yaml"))[0]["name"] == "web"
    header, row = lume("ls").splitlines()
    assert header.split()[:3] == ["NAME", "STATUS", "IP"]
    assert row.split()[:3] == ["web", "running", address]
    assert "BusyBox" in lume("logs", "web")
    assert len(lume("logs", "web", "--lines", "2").splitlines()) == 2
    picture = tmp_path / "web.png"
    lume("screenshot", "web", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    refused = lume.run("set", "web", "--cpu", "2", status=1)
    assert refused.stderr.startswith("lume: ")

    assert lume.run("restart", "web").stderr == "web is off\nweb runs again\n"
    assert server.vm("web")["sharedDirectories"][0]["hostPath"] == str(tmp_path)
    assert "ended by quit" in lume.run("stop", "web", "--force").stderr
    lume("set", "web", "--cpu", "2", "--memory", "512MB")
    assert server.vm("web")["cpu"] == 2
    assert "cpu: 2, would be 3" in lume.run("set", "web", "--cpu", "3", "--dry-run").stderr
    lume("clone", "web", "web2")
    for name in ("web", "web2"):
        lume("delete", name, "--force")
    gone = lume.run("ls")
    assert (gone.stdout, gone.stderr) == ("", "No virtual machines found\n")
    assert lume("ls", "--format", "json") == "[]\n"


@pytest.mark.parametrize(("firmware", "first"), [("bios", "boot loader"), ("uefi", "firmware")])
def test_run_stays_in_front_and_stops_the_guest_on_ctrl_c(
    lume: Lume, server: Server, firmware: str, first: str
) -> None:
    lume("create", "front", *TINY, "--firmware", firmware)
    with lume.start("run", "front") as running:
        assert running.stderr is not None
        overdue = threading.Timer(60, running.kill)
        overdue.start()
        stages = [running.stderr.readline() for _ in range(3)]
        overdue.cancel()
        assert running.poll() is None, stages
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 0, said
    address = next(line for line in stages if "reachable" in line)
    assert address.startswith("front: reachable at 127.77.")
    # It comes from elsewhere, and may be told before the last of what was printed.
    stages.remove(address)
    assert stages == [f"front: {first}\n", "front: kernel\n"]
    assert said.endswith("front is off\n")
    assert server.vm("front")["state"] == "stopped"
    lume("delete", "front", "--force")


def test_run_makes_what_it_is_given_the_image_of(lume: Lume, server: Server) -> None:
    unknown = lume.run("run", "nothing:1", "--registry", "127.0.0.1:1", "--detach", status=1)
    assert "127.0.0.1:1" in unknown.stderr
    source = server.home / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", source, "16M"], check=True)
    lume("create", "fromfile", "--image", os.path.relpath(source), "--disk-size", "1GB")
    assert server.vm("fromfile")["image"] == str(source)
    lume("delete", "fromfile", "--force")


def test_run_ends_with_1_when_the_machine_crashes(lume: Lume, server: Server) -> None:
    lume("create", "crash", *TINY)
    with lume.start("run", "crash") as running:
        server.wait_for("crash", lambda vm: vm["state"] == "running")
        os.kill(server.machine_pid("crash"), signal.SIGKILL)
        _, said = running.communicate(timeout=30)
    assert running.returncode == 1, said
    assert "crash ended at" in said
    lume("delete", "crash", "--force")


def test_the_settings(lume: Lume, server: Server, tmp_path: Path) -> None:
    lume("config", "storage", "add", "fast", str(tmp_path / "fast"))
    lume("config", "storage", "default", "fast")
    rows = lume("config", "storage", "list").splitlines()
    assert any(row.split() == ["fast", str(tmp_path / "fast"), "yes"] for row in rows)
    lume("config", "storage", "default", "home")
    lume("config", "storage", "remove", "fast")
    lume("config", "registry", "ghcr", "--registry", "localhost:5000", "--organization", "o")
    assert lume("config", "registry", "status") == "registry: localhost:5000\norganization: o\n"
    assert "a/b" in lume.run("config", "registry", "ghcr", "--registry", "a/b", status=1).stderr
    assert (
        json.loads(lume("config", "get", "-f", "json"))["registry"]["ghcr"]["organization"] == "o"
    )
    assert "default image: tiny" in lume("config")
    assert "lo" not in lume("config", "network", "interfaces").split()
    assert lume("config", "telemetry", "status").startswith("disabled")
    assert "images: " in lume("config", "cache", "status")
    assert "lume prune" in lume.run("config", "cache", "disable", status=1).stderr


def test_images(lume: Lume) -> None:
    lume("create", "user", *TINY)
    header, *rows = lume("images").splitlines()
    assert header.split()[0] == "NAME"
    assert "tiny" in [row.split()[0] for row in rows]
    images = json.loads(lume("image", "ls", "--format", "json"))
    assert [image["vms"] for image in images if image["name"] == "tiny"] == [["user"]]
    assert "rests on" in lume.run("image", "delete", "tiny", status=1).stderr
    assert "tiny" not in lume("prune", "--dry-run").split()
    pushed = lume("push", "user", "img:1", "--dry-run", "--registry", "r:5000").split()
    assert pushed[0].startswith("r:5000/")
    assert pushed[0].endswith("/img:1")
    assert "has no tag" in lume.run("push", "user", "img", status=1).stderr
    lume("delete", "user", "--force")


@pytest.mark.parametrize(
    "arguments",
    [("setup", "web", "--unattended", "tahoe"), ("ipsw",), ("sip", "on", "web")],
)
def test_commands_of_apple_hosts_say_so(lume: Lume, arguments: tuple[str, ...]) -> None:
    assert "Apple" in lume.run(*arguments, status=1).stderr


# What goes wrong


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("runn", "web"), 'Did you mean "run"?'),
        (("ls", "--formt", "json"), "Did you mean --format?"),
        (("ls", "--format", "xml"), "xml"),
        (("run",), "NAME"),
        (("create", "x", "--cpu", "two"), "two"),
        (("get", "a", "b"), "b"),
    ],
)
def test_a_wrong_command_line_is_status_64(
    lume: Lume, arguments: tuple[str, ...], said: str
) -> None:
    ended = lume.run(*arguments, status=64)
    assert said in " ".join(ended.stderr.split()), ended.stderr
    assert ended.stdout == ""


def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    app = build_cli(Commands(serve=lambda options: 0, doctor=lambda home: 0), [])
    commands: list[tuple[str, ...]] = [(name,) for name in app if name.isalpha()]
    assert len(commands) > 20
    for group in ("config", "image"):
        commands.remove((group,))
        commands += [(group, name) for name in app[group] if name.isalpha()]
    for command in commands:
        app([*command, "--help"])
        shown = capsys.readouterr().out
        assert "Example: lume " in shown or "COMMAND" in shown, command


def test_what_the_server_refuses_is_a_sentence_with_status_1(lume: Lume) -> None:
    missing = lume.run("get", "nobody", status=1)
    assert missing.stderr == "lume: Virtual machine not found: nobody\n"
    assert "cpu" in lume.run("create", "x", "--cpu", "0", status=1).stderr
    assert "no text" in lume.run("create", "x", "--user-data", "/bin/sh", status=1).stderr


def test_nobody_is_asked_where_nobody_can_answer(lume: Lume, server: Server) -> None:
    lume("create", "kept", *TINY)
    assert "--force" in lume.run("delete", "kept", status=1).stderr
    assert server.vm("kept")["state"] == "stopped"
    lume("delete", "kept", "--force")


def test_whoever_closes_the_pipe_gets_no_traceback(lume: Lume) -> None:
    with lume.start("config", "get", "--format", "json") as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read()
        process.wait(30)
    assert said == ""
    assert process.returncode == 1


def test_a_terminal_of_40_columns(lume: Lume) -> None:
    lume("create", "narrow-terminals-are-fine", *TINY)
    lines = run_in_terminal(lume, "ls", columns=40).splitlines()
    assert lines[0].split() == ["NAME", "STATUS", "IP"]
    assert all(len(line) <= 40 for line in lines)
    progress = run_in_terminal(lume, "create", "narrow2", *TINY, columns=40)
    assert "narrow2 is created" in progress
    for name in ("narrow-terminals-are-fine", "narrow2"):
        lume("delete", name, "--force")


def test_what_a_guest_prints_does_not_drive_the_terminal(lume: Lume, server: Server) -> None:
    lume("create", "evil", *TINY)
    lume("run", "evil", "--wait", "ip")
    server.shell("evil", r"printf 'evil\033]0;owned\007\033[2J\n'")
    assert "\x1b]0;owned" in lume("logs", "evil")  # a pipe gets what there is
    shown = run_in_terminal(lume, "logs", "evil")
    assert "\x1b" not in shown
    assert r"evil\x1b]0;owned\x07" in shown
    lume("delete", "evil", "--force")


def end_server(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)
    give_up_at = time.monotonic() + 20
    while is_running(pid):
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


def test_a_server_is_started_if_none_runs(tmp_path: Path, image_cache: Path) -> None:
    lume = Lume(tmp_path / "home", {"LUME_ACCEL": "tcg"})
    refused = lume.run("ls", "--no-start", status=1)
    assert "No server runs for" in refused.stderr
    first = lume.run("ls")
    where = json.loads((tmp_path / "home/server.json").read_text())
    try:
        assert f"listens on {where['url']}" in first.stderr
        assert first.stderr.count("no server was running") == 1
        assert lume.run("ls").stderr == "No virtual machines found\n"
    finally:
        end_server(where["pid"])


def test_many_commands_at_once_start_one_server(tmp_path: Path) -> None:
    lume = Lume(tmp_path / "home", {"LUME_ACCEL": "tcg"})
    commands = [lume.start("ls") for _ in range(4)]
    said = [command.communicate(timeout=60)[1] for command in commands]
    pid = json.loads((tmp_path / "home/server.json").read_text())["pid"]
    try:
        assert [command.returncode for command in commands] == [0] * 4, said
        assert sum("no server was running" in text for text in said) == 1
    finally:
        end_server(pid)


@pytest.mark.parametrize("home", ["/proc/lumed", "/dev/null/x"])
def test_a_home_that_cannot_be_written_is_said(home: str) -> None:
    ended = Lume(Path(home)).run("ls", status=1)
    assert ended.stderr.startswith("lume: ")
    assert home in ended.stderr


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "config.yaml").write_text("vmLocations: 5\n")
    ended = Lume(home).run("ls", status=1)
    assert "The server did not start" in ended.stderr
    assert "config.yaml" in ended.stderr


def test_a_server_that_goes_away_in_the_middle_is_a_sentence(
    tmp_path: Path, image_cache: Path
) -> None:
    with running_server(tmp_path / "home", image_cache) as server:
        lume = Lume(server.home)
        lume("create", "left", *TINY)
        with lume.start("run", "left") as running:
            server.wait_for("left", lambda vm: vm["state"] == "running")
            server.kill()
            _, said = running.communicate(timeout=30)
        assert running.returncode == 1
        assert "lume: The server" in said
        assert "Traceback" not in said


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize(
    ("options", "said"), [("size=4k", "Not enough space"), ("ro", "Read-only")]
)
def test_a_home_without_space_is_a_sentence(tmp_path: Path, options: str, said: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", tmp_path], check=True)
    try:
        if options != "ro":
            (tmp_path / "filler").write_bytes(bytes(4096))
        ended = Lume(tmp_path / "home").run("ls", status=1)
        assert said in ended.stderr
        assert ended.stderr.count("\n") <= 2
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=False)


def test_ctrl_c_cancels_what_is_under_way_and_leaves_nothing(lume: Lume, server: Server) -> None:
    with lume.start("image", "build", "debian:12") as building:
        give_up_at = time.monotonic() + 30
        while not server.call("GET", "/operations?status=running&action=build", 200):
            assert time.monotonic() < give_up_at
            time.sleep(0.05)
        building.send_signal(signal.SIGINT)
        _, said = building.communicate(timeout=60)
    assert building.returncode == 130
    assert said == "lume: cancelling\n"
    last = server.call("GET", "/operations?action=build", 200)[0]
    assert last["status"] == "cancelled"
