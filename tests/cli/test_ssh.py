"""`lume ssh` and `lume cp` up to the guest; what they do in one is in system/test_debian_guest."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer

import pytest

from lumed.cli.ssh import _plan_arguments, _plan_env
from lumed.cli.words import keep_command_apart
from lumed.client.models import parse_vm
from lumed.main import main
from lumed.store.layout import Home
from tests.doubles.one_vm import STOPPED, running, serve_one_vm

WEB = parse_vm(STOPPED)


@pytest.mark.parametrize(
    ("typed", "parsed"),
    [
        ("ssh web", "ssh web"),
        ("ssh web ls -la", "ssh web -- ls -la"),
        ("ssh web -- ls -la", "ssh web -- ls -la"),
        ("ssh -u root web -t 5 tail -t 7 --help", "ssh -u root web -t 5 -- tail -t 7 --help"),
        ("ssh -uroot --timeout=5 web ls -u", "ssh -uroot --timeout=5 web -- ls -u"),
        ("ssh web --no-start ls -- x", "ssh web --no-start -- ls -- x"),
        ("ssh", "ssh"),
        ("ssh web -u", "ssh web -u"),
        ("ls web stop", "ls web stop"),
        ("", ""),
    ],
)
def test_what_comes_after_the_name_is_the_guests(typed: str, parsed: str) -> None:
    assert keep_command_apart(typed.split()) == parsed.split()


def test_a_mistyped_option_is_not_sent_to_the_guest(tmp_path: Path) -> None:
    assert main(["ssh", "--home", str(tmp_path), "web", "--usr", "root"]) == 64


@pytest.mark.parametrize("folder", ["home", 'a b%h"q\\', "-o"])
def test_ssh_reads_the_options_as_they_are_meant(folder: str, tmp_path: Path) -> None:
    home = Home(tmp_path / folder)
    # It looks for the key, and tells the paths of those that are there.
    home.ssh_key.parent.mkdir(parents=True)
    home.ssh_key.touch(0o600)
    arguments = _plan_arguments(home, WEB, 10022, "some body", "secret", 7)
    said = subprocess.check_output(["ssh", *arguments, "-G", "127.77.0.1"], text=True, timeout=10)
    settings = dict(line.split(" ", 1) for line in said.splitlines())
    expected = {
        "user": "some body",
        "port": "10022",
        "hostkeyalias": str(WEB.uuid),
        "userknownhostsfile": str(home.known_hosts),
        "globalknownhostsfile": "/dev/null",
        "stricthostkeychecking": "accept-new",
        "hashknownhosts": "no",
        "identityfile": str(home.ssh_key),
        "identitiesonly": "yes",
        "connecttimeout": "7",
        "numberofpasswordprompts": "1",
    }
    told = {key: value.replace("%%", "%") for key, value in settings.items() if key in expected}
    assert told == expected


def test_the_password_is_told_by_a_program_and_is_in_no_argv(tmp_path: Path) -> None:
    home = Home(tmp_path)
    password = 'it\'s "$HOME" %s \\n'
    assert not any(password in word for word in _plan_arguments(home, WEB, 22, "u", password, 0))
    env = _plan_env(home, password)
    program = Path(env["SSH_ASKPASS"])
    assert program.stat().st_mode & 0o777 == 0o700
    told = subprocess.check_output([program, "lume's password:"], env=env, text=True, timeout=10)
    assert told == password + "\n"


@pytest.mark.parametrize(
    ("vm", "told"),
    [
        ({}, "web is not running: it is stopped\n  lume run web\n"),
        ({"state": "running", "networkMode": "none"}, "web has no network"),
        ({"name": "other"}, "not here"),
    ],
)
def test_a_guest_that_cannot_be_reached_is_told_from_a_command_that_failed(
    vm: dict[str, object], told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with serve_one_vm(tmp_path, vm):
        assert main(["ssh", "--home", str(tmp_path), "web", "false"]) == 255
        assert told in capfd.readouterr().err
        assert main(["cp", "--home", str(tmp_path), "web:x", "y"]) == 1
        assert told in capfd.readouterr().err


@pytest.fixture
def guest() -> Iterator[tuple[ThreadingTCPServer, list[object]]]:
    """An SSH server that is busy at the first connection, and hangs up at later ones; and all."""
    seen: list[object] = []

    class HangUp(StreamRequestHandler):
        def handle(self) -> None:
            seen.append(self)
            if len(seen) > 1:
                self.wfile.write(b"SSH-2.0-x\r\n")

    with ThreadingTCPServer(("127.0.0.1", 0), HangUp) as guest:
        thread = threading.Thread(target=guest.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield guest, seen
        guest.shutdown()
        thread.join(10)


def test_a_guest_is_waited_for_and_when_it_hangs_up_that_is_a_sentence(
    guest: tuple[ThreadingTCPServer, list[object]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    server, connections = guest
    vm = {**running(("127.0.0.1", server.server_address[1])), "sshAvailable": False}
    with serve_one_vm(tmp_path, vm):
        assert main(["ssh", "--home", str(tmp_path), "web", "true"]) == 255
        told = capfd.readouterr().err
        # Twice to see whether it answers, and ssh's own.
        assert len(connections) == 3
        assert main(["cp", "--home", str(tmp_path), "web:x", "y"]) == 1
    assert told.startswith("lume: ")
    assert "onnection" in told
    assert told.count("\n") == 1
    assert capfd.readouterr().err.startswith("lume: ")


def test_a_guest_without_an_ssh_server_is_waited_for_as_long_as_asked(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # It accepts and is silent, as a forward does whose guest does not answer.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        vm = {**running(silent.getsockname()), "sshAvailable": False}
        with serve_one_vm(tmp_path, vm):
            assert main(["ssh", "--home", str(tmp_path), "-t", "1", "web", "true"]) == 255
    assert "No SSH server answered in web within 1 s" in capfd.readouterr().err


def test_ssh_that_is_missing_is_named_with_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for words in (["ssh", "web"], ["cp", "web:x", "y"]):
        main([*words, "--home", str(tmp_path)])
        assert "apt-get install openssh-client" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["./x", "./y"], "Neither side"),
        (["web:x", "db:y"], "Both sides"),
        (["./nothing", "web:"], "does not exist"),
        (["/", "web:"], "lume cp -r"),
        (["./a:b", "/c:d"], "Neither side"),
    ],
)
def test_cp_says_what_is_wrong_before_it_asks_a_server(
    words: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["cp", "--no-start", "--home", str(tmp_path), *words]) == 1
    assert told in capfd.readouterr().err


def test_a_terminal_is_left_to_ssh(tmp_path: Path) -> None:
    """Its signals and job control are, since lume becomes ssh."""
    ours, theirs = os.openpty()
    with serve_one_vm(tmp_path / "home", running(("127.0.0.1", 1))):
        stand_in = tmp_path / "ssh"
        stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$$ $*"\nexit 9\n')
        stand_in.chmod(0o755)
        command = "import sys; from lumed.main import main; sys.exit(main())"
        process = subprocess.Popen(
            [sys.executable, "-c", command, "ssh", "--home", str(tmp_path / "home"), "web"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        )
        os.close(theirs)
        assert process.wait(20) == 9
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        said = terminal.read(4096).decode()
    assert said.startswith(f"{process.pid} ")
    assert said.rstrip().endswith("-t -- 127.0.0.1")
