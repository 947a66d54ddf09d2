"""Where a server listens beside its port, who may ask there, and what that costs."""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import httpx2 as httpx
import pytest

from lumed import Client
from lumed.client.errors import ServerUnreachable
from lumed.errors import InvalidField, Unauthorized
from lumed.http.listen import bind_listeners, find_address
from tests.registry.world import make_certificate
from tests.server.test_serve import assert_refused, over_unix_socket, serving
from tests.system.harness import run_lume


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def where(home: Path) -> dict[str, str]:
    return dict(json.loads((home / "server.json").read_text()))


def read_log(home: Path) -> str:
    return "".join(path.read_text() for path in (home / "logs").iterdir())


# The second port


def test_the_compat_port_is_told_and_speaks_of_disks_in_bytes(home: Path) -> None:
    with serving(home, "--compat-port", "0") as server:
        compat = where(home)["compatUrl"]
        assert compat != server.url
        assert re.fullmatch(
            rf"lumed \S+ listens on {server.url} and for Lume's own clients on {compat} "
            rf"\(home {home}\)\n",
            server.said,
        )
        body = {"name": "web", "os": "linux", "cpu": 1, "memory": "64MB", "diskSize": "64MB"}
        server.call("POST", "/vms", 202, json=body)
        made = server.wait_for("web", lambda vm: vm["state"] == "stopped")
        assert made["diskSize"] == "64MB"
        (seen,) = httpx.get(f"{compat}/lume/vms").json()
        assert seen["diskSize"] == made["disk"]
        with over_unix_socket(home / "run/lume.sock") as client:
            assert client.get("/lume/vms/web").json() == made
        # Nobody stands between us and the client, whatever it says.
        forwarded = {"x-forwarded-proto": "https", "origin": compat.replace("http", "https")}
        for headers in ({"host": "evil.example"}, forwarded):
            assert httpx.get(f"{compat}/lume/vms", headers=headers).status_code == 403
        server.call("DELETE", "/vms/web", 200)


def test_a_taken_compat_port_is_told_by_its_option(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run_lume("serve", "--port=0", f"--compat-port={port}", f"--home={home}")
    assert_refused(ended, f"Cannot listen on 127.0.0.1:{port}", f"--compat-port {port + 1}")
    assert not (home / "run/lume.sock").exists()
    for odd in ("65536", "-1", "many"):
        assert run_lume("serve", "--compat-port", odd).returncode == 64


# The token


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])  # noqa: S104
def test_the_network_is_not_served_without_a_token(home: Path, host: str) -> None:
    ended = run_lume("serve", "--port=0", f"--host={host}", f"--home={home}")
    assert_refused(ended, f"--host {host} can be reached from other machines", "--new-token")
    assert not (home / "run/lume.sock").exists()


def test_a_new_token_is_told_once_kept_and_asked_for_on_every_port(home: Path) -> None:
    arguments = ("--host", "0.0.0.0", "--compat-port", "0")  # noqa: S104
    with serving(home, *arguments, "--new-token", quiet=False):
        first = (home / "token").read_text().strip()
        assert (home / "token").stat().st_mode & 0o777 == 0o600
    told = (home.parent / "stderr").read_text()
    assert told.count(first) == 1
    assert str(home / "token") in told
    with serving(home, *arguments, quiet=False) as server:
        assert (home / "token").read_text().strip() == first
        for url in (server.url, where(home)["compatUrl"]):
            for headers in ({}, bearer("wrong"), bearer(first + "x")):
                reply = httpx.get(f"{url}/lume/vms", headers=headers)
                assert (reply.status_code, reply.json()["code"]) == (401, "unauthorized")
                assert reply.headers["www-authenticate"] == "Bearer"
            assert httpx.get(f"{url}/lume/vms", headers=bearer(first)).json() == []
            # Reached by this host's name, or by any of its addresses.
            port = httpx.URL(url).port
            for name in (socket.gethostname(), "192.0.2.7", "localhost"):
                named = {**bearer(first), "host": f"{name}:{port}"}
                assert httpx.get(f"{url}/lume/vms", headers=named).status_code == 200
        with over_unix_socket(home / "run/lume.sock") as client:
            assert client.get("/lume/vms").json() == []
        assert "the token travels in clear" in (home.parent / "stderr").read_text()
    with serving(home, "--new-token", quiet=False) as server:
        second = (home / "token").read_text().strip()
        assert second != first
        # On loopback, too: every user of this host can connect there.
        for token, status in ((first, 401), (second, 200)):
            reply = httpx.get(f"{server.url}/lume/vms", headers=bearer(token))
            assert reply.status_code == status
    for token in (first, second):
        assert token not in read_log(home)


def test_a_refused_body_is_not_waited_for_and_the_connection_may_go_on(home: Path) -> None:
    (home).mkdir()
    (home / "token").touch(0o600)
    (home / "token").write_text("s3cret\n")
    with serving(home) as server:
        port = httpx.URL(server.url).port or 0
        with socket.create_connection(("127.0.0.1", port), 5) as connection:
            connection.sendall(
                b"POST /lume/vms HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n"
            )
            assert connection.recv(65536).startswith(b"HTTP/1.1 401 ")
        with httpx.Client() as client:
            for headers, status in (({}, 401), (bearer("s3cret"), 422)):
                reply = client.post(f"{server.url}/lume/vms", json={}, headers=headers)
                assert reply.status_code == status


def test_a_token_file_that_cannot_be_trusted_keeps_the_server_from_starting(
    home: Path, tmp_path: Path
) -> None:
    file = tmp_path / "t"
    file.write_text("s3cret\n")
    file.chmod(0o644)
    arguments = ("serve", "--port=0", f"--home={home}", "--token-file")
    assert_refused(run_lume(*arguments, str(file)), str(file), "mode 0644", f"chmod 600 {file}")
    assert_refused(run_lume(*arguments, str(tmp_path / "none")), "No such file")
    file.chmod(0o600)
    with serving(home, "--token-file", str(file)) as server:
        for token, status in (("s3cret", 200), ("wrong", 401)):
            reply = httpx.get(f"{server.url}/lume/vms", headers=bearer(token))
            assert reply.status_code == status
    assert run_lume(*arguments, str(file), "--new-token").returncode == 64
    assert not (home / "token").exists()
    # What lies in the home is not passed over because it is odd.
    (home / "token").symlink_to(file)
    assert_refused(run_lume("serve", "--port=0", f"--home={home}"), "it is a link")


# TLS


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


def tls_options(pair: tuple[Path, Path]) -> tuple[str, ...]:
    return (f"--tls-cert={pair[0]}", f"--tls-key={pair[1]}")


def test_the_ports_speak_tls_and_the_unix_socket_does_not(
    home: Path, pair: tuple[Path, Path]
) -> None:
    trust = ssl.create_default_context(cafile=str(pair[0]))
    with serving(home, *tls_options(pair), "--compat-port=0", quiet=False) as server:
        assert where(home)["url"] == server.url
        for url in (server.url, where(home)["compatUrl"]):
            assert url.startswith("https://127.0.0.1:")
            with httpx.Client(verify=trust) as client:
                assert client.get(f"{url}/lume/vms").json() == []
                own = {"origin": url}
                assert client.post(f"{url}/lume/vms", json={}, headers=own).status_code == 422
                foreign = {"origin": url.replace("https", "http")}
                assert client.get(f"{url}/lume/vms", headers=foreign).status_code == 403
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                httpx.get(url)
            with pytest.raises(httpx.TransportError):
                httpx.get(url.replace("https", "http"))
        with over_unix_socket(home / "run/lume.sock") as client:
            assert client.get("/lume/vms").json() == []


def test_open_tls_connections_do_not_keep_the_server_from_ending(
    home: Path, pair: tuple[Path, Path]
) -> None:
    trust = ssl.create_default_context(cafile=str(pair[0]))
    with serving(home, *tls_options(pair)) as server, httpx.Client(verify=trust) as idle:
        assert idle.get(f"{server.url}/lume/vms").status_code == 200
        address = ("127.0.0.1", httpx.URL(server.url).port or 0)
        with socket.create_connection(address):
            started = time.monotonic()
            server.stop()
            assert time.monotonic() - started < 7


def test_half_of_tls_or_a_wrong_file_is_told_before_anything_is_bound(
    home: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    serve = ("serve", "--port=0", f"--home={home}")
    for one in tls_options(pair):
        assert run_lume(*serve, one).returncode == 64
    ended = run_lume(*serve, f"--tls-cert={tmp_path / 'none'}", f"--tls-key={pair[1]}")
    assert_refused(ended, f"--tls-cert {tmp_path / 'none'} cannot be used: No such file")
    other = make_certificate(tmp_path)
    assert_refused(run_lume(*serve, *tls_options((pair[0], other[1]))), "is not the key of")
    assert not (home / "run/lume.sock").exists()


# The unix socket's users


def let_everybody_come(path: Path) -> None:
    """Let every user come as far as a socket: the server has to say no by itself."""
    path.chmod(0o666)
    for folder in path.parents:
        if not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)


_ASK = """
import os, socket, sys
uid = int(sys.argv[2])
os.setgroups([])
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
with socket.socket(socket.AF_UNIX) as asking:
    asking.connect(sys.argv[1])
    asking.sendall(b"POST /lume/vms HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n"
                   b"Authorization: Bearer s3cret\\r\\nContent-Length: 2\\r\\n\\r\\n{}")
    while data := asking.recv(65536):
        print(data.decode(), end="")
"""


def ask_as(uid: int, path: Path) -> str:
    """What a user is answered over the socket."""
    command = [sys.executable, "-I", "-c", _ASK, str(path), str(uid)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="being another user is root's")
def test_another_user_may_not_use_the_unix_socket_whatever_it_knows(home: Path) -> None:
    home.mkdir()
    (home / "token").touch(0o600)
    (home / "token").write_text("s3cret\n")
    with serving(home):
        path = home / "run/lume.sock"
        let_everybody_come(path)
        said = ask_as(65534, path)
        assert said.startswith("HTTP/1.1 403 ")
        assert "The user with uid 65534 may not use this socket" in said
        assert ask_as(0, path).startswith("HTTP/1.1 422 ")


# What it costs


def count_wake_ups(pid: int) -> int:
    """How often the threads of a process gave up the processor by themselves, until now."""
    total = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        match = re.search(r"^voluntary_ctxt_switches:\s+(\d+)", status.read_text(), re.M)
        total += int(match[1]) if match else 0
    return total


def test_no_listener_wakes_an_idle_server_up(home: Path, pair: tuple[Path, Path]) -> None:
    with serving(home, "--compat-port=0", *tls_options(pair)) as server:
        assert server.process is not None
        with over_unix_socket(home / "run/lume.sock") as client:
            assert client.get("/lume/vms").status_code == 200
            idle_s, quiet = 1.0, False
            give_up_at = time.monotonic() + 20
            while not quiet:
                assert time.monotonic() < give_up_at, "it wakes up all the time"
                before = count_wake_ups(server.process.pid)
                time.sleep(idle_s)
                quiet = count_wake_ups(server.process.pid) == before


def test_the_python_client_shows_a_token_and_trusts_what_it_is_told(
    home: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("open-sesame\n")
    token.chmod(0o600)
    with serving(home, *tls_options(pair), f"--token-file={token}") as server:
        with Client(server.url, token="open-sesame", ca=pair[0]) as client:
            assert client.list_vms() == []
            assert next(iter(client.events())).kind == "reset"
        for wrong in (None, "open-says-me"):
            with (
                Client(server.url, token=wrong, ca=pair[0]) as client,
                pytest.raises(Unauthorized, match="token"),
            ):
                client.list_vms()
        with (
            Client(server.url, token="open-sesame") as client,
            pytest.raises(ServerUnreachable, match="not to be trusted"),
        ):
            client.list_vms()
        with Client(home=home) as client:
            assert client.list_vms() == []
    with pytest.raises(InvalidField, match="holds no certificates"):
        Client("https://localhost:1", ca=token)


def test_answers_do_not_wait_for_acknowledgements(home: Path) -> None:
    home.mkdir(mode=0o700)
    bound = bind_listeners(find_address("127.0.0.1"), 0, 0, home / "lume.sock")
    try:
        assert bound.compat is not None
        for listener in (bound.tcp, bound.compat):
            # What asyncio looks at before it sets TCP_NODELAY.
            assert listener.proto == socket.IPPROTO_TCP
    finally:
        bound.close()
