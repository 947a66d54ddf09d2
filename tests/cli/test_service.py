"""`lume service` over a stand-in for the user's systemd, which starts real servers."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lumed.cli.service import plan_unit
from lumed.errors import InvalidField
from lumed.main import main
from lumed.store.layout import Home
from tests.system.harness import is_running, running_server

SCRIPT = Path(__file__).parents[1] / "doubles" / "user_systemd.py"


class Systemd:
    """The stand-in, as a test sees it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.unit = folder / "config" / "systemd" / "user" / "lumed.service"

    @property
    def pid(self) -> int:
        """The main process of the service, 0 if there is none."""
        state = self.folder / "state.json"
        return int(json.loads(state.read_text())["pid"]) if state.exists() else 0

    def take_calls(self) -> list[str]:
        """What it was asked since the last time."""
        calls = self.folder / "calls"
        text = calls.read_text()
        calls.write_text("")
        return text.splitlines()

    def end_main_process(self) -> None:
        """Kill it, as it crashes; its restart is still to come."""
        pidfd = os.pidfd_open(self.pid)
        os.kill(self.pid, signal.SIGKILL)
        assert select.select([pidfd], [], [], 10)[0]
        os.close(pidfd)

    def take_as_main_process(self, pid: int) -> None:
        """Another process stands for one of the service that is still starting."""
        state = self.folder / "state.json"
        state.write_text(json.dumps({**json.loads(state.read_text()), "pid": pid}))


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Systemd]:
    """A user's systemd on PATH; its service is gone at the end."""
    folder = tmp_path / "systemd"
    (folder / "bin").mkdir(parents=True)
    for program in ("systemctl", "loginctl"):
        script = folder / "bin" / program
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {SCRIPT} {program} "$@"\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("USER_SYSTEMD", str(folder))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
    systemd = Systemd(folder)
    yield systemd
    if systemd.pid and is_running(systemd.pid):
        os.kill(systemd.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_service_takes_over_is_changed_and_goes(
    systemd: Systemd, tmp_path: Path, image_cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    home, port = tmp_path / "home", free_port()
    install = ["service", "install", "--home", str(home), "--port"]
    with running_server(home, image_cache) as other:
        assert other.process is not None
        assert main([*install, str(port)]) == 0
        assert other.process.wait(10) == 0
        told = capfd.readouterr()
        assert f"process {other.process.pid}) is ended; its machines run on" in told.err
        assert "loginctl enable-linger" in told.err
        assert told.out == f"http://127.0.0.1:{port}\n"
        first = systemd.pid
        assert is_running(first)
        assert main(["service", "status", "--format", "json"]) == 0
        assert json.loads(capfd.readouterr().out) == {
            "installed": str(systemd.unit),
            "enabled": True,
            "active": True,
            "home": str(home),
            "url": f"http://127.0.0.1:{port}",
            "lingers": False,
        }

        systemd.take_calls()
        assert main([*install, str(port), "--linger"]) == 0
        assert systemd.pid == first
        asked = systemd.take_calls()
        assert "loginctl enable-linger" in asked
        assert not any("restart" in call or "daemon-reload" in call for call in asked)

        port, compat = free_port(), free_port()
        assert main([*install, str(port), "--", "--compat-port", str(compat)]) == 0
        assert capfd.readouterr().out.endswith(f":{port}\n")
        assert systemd.pid != first
        assert not is_running(first)
        socket.create_connection(("127.0.0.1", compat), 5).close()

        last = systemd.pid
        assert main(["service", "uninstall"]) == 0
        assert not systemd.unit.exists()
        assert not is_running(last)
        assert home.exists()
        assert main(["service", "status"]) == 1
        assert "active: no" in capfd.readouterr().out
        assert main(["service", "uninstall"]) == 0


def test_a_command_that_finds_no_server_starts_the_service(
    systemd: Systemd, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    home, port = ["--home", str(tmp_path / "home")], free_port()
    assert main(["service", "install", *home, "--port", str(port)]) == 0
    systemd.end_main_process()
    first = systemd.pid
    capfd.readouterr()
    assert main(["ls", *home]) == 0
    assert systemd.pid != first
    record = json.loads((tmp_path / "home" / "server.json").read_text())
    assert record["pid"] == systemd.pid
    assert capfd.readouterr().err.splitlines()[0] == (
        "lume: no server was running; lumed.service is started, and listens on "
        f"http://127.0.0.1:{port}"
    )


def test_a_service_that_does_not_start_is_no_server(
    systemd: Systemd, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    home, port = tmp_path / "home", free_port()
    assert main(["service", "install", "--home", str(home), "--port", str(port)]) == 0
    systemd.end_main_process()
    with socket.create_server(("127.0.0.1", port)):
        assert main(["ls", "--home", str(home)]) == 1
    assert "ends at once\n  why: journalctl --user -u lumed.service" in capfd.readouterr().err


def test_another_server_that_has_the_home_is_told_and_ended(
    systemd: Systemd, tmp_path: Path, image_cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    install = ["service", "install", "--home", str(home), "--port", str(free_port())]
    assert main(install) == 0
    systemd.end_main_process()
    with (
        running_server(home, image_cache) as other,
        subprocess.Popen(["sleep", "60"]) as starting,
    ):
        assert other.process is not None
        systemd.take_as_main_process(starting.pid)
        capfd.readouterr()
        assert main(["service", "status"]) == 0
        told = capfd.readouterr()
        assert f"another server (process {other.process.pid}) has the home" in told.err
        assert "url: -" in told.out
        assert main(install) == 0
        assert other.process.wait(10) == 0
    assert main(["service", "status"]) == 0
    told = capfd.readouterr()
    assert "another server" not in told.err.splitlines()[-1]
    assert f"url: http://127.0.0.1:{install[-1]}" in told.out


@pytest.mark.parametrize(
    ("given", "uid", "used"),
    [
        ("", None, f"/run/user/{os.getuid()}"),
        ("/nowhere", None, f"/run/user/{os.getuid()}"),
        # As su leaves it: of the user that one was before.
        ("{tmp_path}", 12345, "/run/user/12345"),
        ("{tmp_path}", None, "{tmp_path}"),
    ],
)
def test_systemd_is_asked_where_this_users_listens(
    given: str,
    uid: int | None,
    used: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "systemctl").write_text('#!/bin/sh\necho "asked: $XDG_RUNTIME_DIR" >&2; exit 1\n')
    (tmp_path / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", given.format(tmp_path=tmp_path))
    if uid is not None:
        monkeypatch.setattr(os, "getuid", lambda: uid)
    assert main(["service", "status"]) == 1
    assert f"asked: {used.format(tmp_path=tmp_path)}\n" in capfd.readouterr().err


def test_a_server_that_does_not_start_is_no_success(
    systemd: Systemd, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["service", "install", "--home", str(tmp_path / "home"), "--port", port]) == 1
    assert "ends at once\n  why: journalctl --user -u lumed.service" in capfd.readouterr().err


@pytest.mark.parametrize("program", [None, "echo 'Failed to connect to bus' >&2; exit 1"])
def test_without_systemd_it_says_what_to_do_instead(
    program: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if program is not None:
        (tmp_path / "systemctl").write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    home = tmp_path / "100%"
    assert main(["service", "install", "--port", "7001", "--home", str(home)]) == 1
    lines = capfd.readouterr().err.splitlines()
    line = f"{sys.executable} -m lumed serve --port 7001 --home {home} >/dev/null 2>&1"
    assert f"  nohup {line} &" in lines
    assert f"  @reboot {line}".replace("%", "\\%") in lines
    assert not (tmp_path / "config").exists()


def test_what_is_no_option_of_serve_is_said_before_anything_is_done(
    systemd: Systemd, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["service", "install", "--prot", "5"]) == 64
    assert main(["service", "install", "5"]) == 1
    assert "5 is no option of lume serve" in capfd.readouterr().err
    assert not systemd.unit.exists()


def test_the_unit_says_what_was_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUME_ACCEL", "100%$x")
    lines = plan_unit(("/p", "--home", '/a b%h"$HOME\\'), Home(Path("/a b"))).splitlines()
    # systemd.syntax(7), and systemd.service(5), "Command lines": both % and $ are doubled there.
    assert 'ExecStart=/p --home "/a b%%h\\"$$HOME\\\\"' in lines
    assert 'Environment="LUME_ACCEL=100%%$x"' in lines
    # Without it, systemd would end the machines with the server.
    assert "KillMode=process" in lines
    assert "X-Home=/a b" in lines


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_finds_the_unit_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUME_ACCEL", 'a b%!"$x\\')
    home = Home(tmp_path / 'o d%!"q$HOME\\')
    command = (sys.executable, "-m", "lumed", "serve", "--home", str(home.root))
    unit = tmp_path / "lumed.service"
    unit.write_text(plan_unit(command, home))
    ended = subprocess.run(
        ["systemd-analyze", "--user", "verify", unit],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
    )
    # It looks at the machine's own units too.
    assert "lumed.service" not in ended.stderr
    assert ended.returncode == 0, ended.stderr


def test_a_line_feed_cannot_add_a_line_to_the_unit() -> None:
    with pytest.raises(InvalidField):
        plan_unit(("lume", "serve", "--home", "/x\nExecStop=/bin/false"), Home(Path("/x")))
