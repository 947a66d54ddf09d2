"""`lume serve` and `lume doctor` as processes: what they print, hold and leave."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
import requests

from lumed.osproc import find_process
from tests.system.harness import Server, run_lume


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@contextlib.contextmanager
def serving(home: Path, *arguments: str, quiet: bool = True) -> Iterator[Server]:
    """A server; it ends by SIGTERM and says nothing but its one line, whatever happens."""
    stderr = home.parent / "stderr"
    # No machine is started here, so KVM need not be tried out for each new home.
    server = Server(home, arguments=arguments, stderr=stderr, env={"LUME_ACCEL": "tcg"})
    try:
        server.start()
        yield server
        server.stop()
    finally:
        server.kill()
        server.end_machines()
    assert server.said.count("\n") == 1
    complaints = stderr.read_text()
    assert "Traceback" not in complaints
    assert not (quiet and complaints), complaints


def over_unix_socket(path: Path) -> httpx.Client:
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost")


# Where it listens


def test_it_prints_one_line_and_writes_down_where_it_listens(home: Path) -> None:
    with serving(home) as server:
        assert re.fullmatch(
            rf"lumed \S+ listens on http://127\.0\.0\.1:\d+ \(home {home}\)\n", server.said
        )
        written = json.loads((home / "server.json").read_text())
        assert written["url"] == server.url
        assert server.process is not None
        assert written["pid"] == server.process.pid
        process = find_process(server.process.pid)
        assert process is not None
        assert written["startTicks"] == process.start_ticks
        assert written["socket"] == str(home / "run/lume.sock")
        assert server.call("GET", "/vms", 200) == []
    assert not (home / "server.json").exists()
    assert not (home / "run/lume.sock").exists()


def test_each_loopback_host_can_be_chosen(home: Path) -> None:
    for host, shown in (("::1", "[::1]"), ("127.0.0.2", "127.0.0.2"), ("localhost", None)):
        with serving(home, "--host", host) as server:
            assert shown is None or server.url.startswith(f"http://{shown}:")
            assert httpx.get(f"{server.url}/lume/vms").json() == []
            if host == "localhost":
                port = httpx.URL(server.url).port
                assert requests.get(f"http://localhost:{port}/vms", timeout=5).json() == []


def test_the_api_answers_over_a_private_unix_socket(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "my.sock"
    with serving(home, "--socket", str(path)) as server:
        assert path.stat().st_mode & 0o777 == 0o600
        with over_unix_socket(path) as client:
            assert client.get("/lume/vms").json() == server.call("GET", "/vms")
            foreign = client.get("/lume/vms", headers={"host": "evil.example"})
            assert foreign.status_code == 403
    assert not path.exists()


def test_a_socket_that_a_killed_server_left_is_replaced_and_nothing_else(
    home: Path, tmp_path: Path
) -> None:
    path = tmp_path / "my.sock"
    server = Server(home, arguments=["--socket", str(path)])
    server.start()
    server.kill()
    assert path.is_socket()
    with serving(home, "--socket", str(path)):
        other = run_lume("serve", "--port=0", f"--home={tmp_path / 'b'}", f"--socket={path}")
        assert (other.returncode, "somebody listens there" in other.stderr) == (1, True)
        with over_unix_socket(path) as client:
            assert client.get("/lume/vms").status_code == 200
    path.write_text("a file of mine")
    ended = run_lume("serve", "--port=0", f"--home={home}", f"--socket={path}")
    assert (ended.returncode, "it exists and is no socket" in ended.stderr) == (1, True)
    assert path.read_text() == "a file of mine"


def test_a_socket_path_that_is_too_long_is_refused_and_a_deep_home_is_not(
    home: Path, tmp_path: Path
) -> None:
    long = tmp_path / ("x" * 110)
    ended = run_lume("serve", "--port=0", f"--home={home}", f"--socket={long}")
    assert ended.returncode == 1
    assert "at most 107 bytes" in ended.stderr
    deep = tmp_path / ("x" * 120) / "home"
    deep.parent.mkdir()
    with serving(deep):
        path = Path(json.loads((deep / "server.json").read_text())["socket"])
        assert len(os.fsencode(path)) < 108
        assert path.parent.stat().st_mode & 0o777 == 0o700
        with over_unix_socket(path) as client:
            assert client.get("/lume/vms").json() == []
    path.parent.rmdir()


def test_the_home_can_come_from_the_environment(home: Path) -> None:
    home.mkdir()
    (home / "config.yaml").write_text("damaged")
    for command in (("serve", "--port=0"), ("doctor",)):
        ended = run_lume(*command, env={"LUME_HOME": str(home)})
        assert_refused(ended, str(home / "config.yaml"))


# What keeps it from starting


def assert_refused(ended: subprocess.CompletedProcess[str], *words: str) -> None:
    """A sentence on stderr, status 1, and nothing else."""
    assert (ended.returncode, ended.stdout) == (1, ""), ended.stderr
    assert ended.stderr.startswith("lume: ")
    assert all(word in ended.stderr for word in words), ended.stderr


def test_a_taken_port_is_told_with_another_one(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run_lume("serve", f"--port={port}", f"--home={home}")
    assert_refused(ended, f"Cannot listen on 127.0.0.1:{port}", f"--port {port + 1}")


def test_a_host_that_is_not_ours_is_told(home: Path) -> None:
    for host in ("nowhere.invalid", "192.0.2.1"):
        ended = run_lume("serve", "--port=0", f"--home={home}", f"--host={host}")
        assert_refused(ended, host)


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--nope"],
        ["serve", "--port", "many"],
        ["serve", "--port", "65536"],
        ["serve", "--port", "-1"],
        ["serve", "extra"],
        ["frobnicate"],
        ["--nope"],
    ],
)
def test_a_wrong_command_line_is_a_usage_error(arguments: list[str]) -> None:
    assert run_lume(*arguments).returncode == 64


def test_help_and_version_are_told() -> None:
    for arguments in ([], ["--help"], ["serve", "--help"], ["doctor", "--help"], ["--version"]):
        ended = run_lume(*arguments)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert ended.stdout.strip()


@pytest.mark.parametrize("command", [("serve", "--port=0"), ("doctor",)])
def test_damaged_settings_are_told_with_the_place(home: Path, command: tuple[str, ...]) -> None:
    home.mkdir()
    (home / "config.yaml").write_text("cachingEnabled: true\nvmLocations: [\n")
    ended = run_lume(*command, f"--home={home}")
    assert_refused(ended, f"The settings file {home / 'config.yaml'} cannot be read: line 3: ")
    assert [path.name for path in home.iterdir()] == ["config.yaml"]


def test_a_home_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "locked/server.lock").mkdir(parents=True)
    for home in ("/proc/none", str(file), str(file / "below"), str(tmp_path / "locked")):
        assert_refused(run_lume("serve", "--port=0", f"--home={home}"), home)
    assert_refused(run_lume("doctor", f"--home={file}/below"), str(file))


def test_an_odd_log_level_is_told(home: Path) -> None:
    ended = run_lume("serve", "--port=0", f"--home={home}", env={"LUME_LOG_LEVEL": "loud"})
    assert_refused(ended, "LUME_LOG_LEVEL: 'loud' is no level")


def test_the_doctor_says_what_is_there_and_what_mends_the_rest(home: Path, tmp_path: Path) -> None:
    ended = run_lume("doctor", f"--home={home}")
    assert ended.returncode in (0, 1)
    assert ended.stderr == ""
    for word in ("QEMU", "qemu-img", "UEFI firmware", "accelerator", "virtiofsd", "free space"):
        assert re.search(rf"^(ok|--)  {word} ", ended.stdout, re.MULTILINE), word
    missing = run_lume("doctor", f"--home={home}", env={"PATH": str(tmp_path)})
    assert missing.returncode == 1
    assert re.search(r"^--  QEMU .*\n(.*\n)*? +mend: .*apt-get install", missing.stdout, re.M)


# How it ends

# For a host that is busy with other tests.
SLACK_S = 2


def test_sigterm_ends_it_at_once_though_a_connection_is_kept(home: Path) -> None:
    with serving(home) as server, requests.Session() as idle:
        assert idle.get(f"{server.url}/lume/vms", timeout=5).status_code == 200
        started = time.monotonic()
        server.stop()
        assert time.monotonic() - started < 1 + SLACK_S


def test_sigterm_ends_it_though_a_request_never_ends(home: Path) -> None:
    with serving(home, quiet=False) as server:
        address = ("127.0.0.1", httpx.URL(server.url).port or 0)
        with socket.create_connection(address) as silent, socket.create_connection(address) as half:
            half.sendall(
                b"POST /lume/vms HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
            )
            # Answered only after both were accepted.
            server.call("GET", "/vms", 200)
            started = time.monotonic()
            server.stop()
            assert time.monotonic() - started < 5 + SLACK_S
            assert silent.recv(100) == b""
            assert half.recv(65536).startswith(b"HTTP/1.1 503 ")


def test_a_killed_server_is_followed_by_the_next(home: Path) -> None:
    server = Server(home)
    server.start()
    server.kill()
    assert (home / "server.json").exists()
    with serving(home) as server:
        assert json.loads((home / "server.json").read_text())["url"] == server.url


# What comes in


def test_a_body_of_20_mb_is_refused_and_the_connection_goes_on(home: Path) -> None:
    def in_chunks() -> Iterator[bytes]:
        for _ in range(320):
            yield b" " * 65536

    with serving(home) as server, requests.Session() as session:
        json_type = {"Content-Type": "application/json"}
        for _ in range(2):
            for data in (b" " * 20_000_000, in_chunks()):
                reply = session.post(
                    f"{server.url}/lume/vms", data=data, headers=json_type, timeout=10
                )
                assert reply.status_code == 413, reply.text
                assert reply.json()["code"] == "too_large"
                assert session.get(f"{server.url}/lume/vms", timeout=5).json() == []


def test_odd_bytes_on_the_port_harm_nobody(home: Path) -> None:
    oddities = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\r\n\r\n",
        b"GET /lume/vms HTTP/1.1\r\n\r\n",
        b"GET /lume/vms HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /lume/vms/%ff%fe HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"GET http://evil.example/lume/vms HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        b"POST /lume/vms HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /lume/vms HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ]
    with serving(home, quiet=False) as server:
        for odd in oddities:
            address = ("127.0.0.1", httpx.URL(server.url).port or 0)
            with socket.create_connection(address, 5) as connection:
                connection.sendall(odd)
                connection.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionError):
                    answer = connection.recv(65536)
                    assert not re.match(rb"HTTP/1.1 (2|5)", answer), (odd, answer)
            assert server.call("GET", "/vms", 200) == []
