"""A server on the network, and those who ask it from another machine: a network namespace."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from tests.qemu.network_world import Outside, outside, run_ip
from tests.server.test_serve import assert_refused, serving
from tests.system.harness import Server, run_lume

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")

TOKEN = "open-sesame"
HERE_6, THERE_6 = "fd77:61::1", "fd77:61::2"

# The status of a GET for each line of headers; "" for no connection that can be trusted.
_STATUSES = """
import json, ssl, sys
import httpx2 as httpx
url, ca, *lines = sys.argv[1:]
context = ssl.create_default_context(cafile=ca or None)
with httpx.Client(verify=context, timeout=10) as client:
    for line in lines:
        try:
            print(client.get(url + "/lume/vms", headers=json.loads(line)).status_code)
        except httpx.ConnectError:
            print("")
"""
_LIFE = """
import sys
from lumed import Client
url, token, ca = sys.argv[1:]
with Client(url, token=token, ca=ca or None) as client, Client(
    url, token=token, ca=ca or None
) as watcher:
    events = watcher.events(vm="far")
    print(next(events).kind)
    client.create_vm("far", cpu=1, memory="64MB", disk_size="64MB")
    while (event := next(events)).vm is None or event.vm.state != "stopped":
        pass
    print(client.get_vm("far").state)
    client.delete_vm("far")
    while (event := next(events)).kind != "vm-deleted":
        pass
    print(event.kind)
"""


@pytest.fixture(scope="module")
def place() -> Iterator[Outside]:
    """The other machine; it reaches this host at host_address and HERE_6."""
    with contextlib.ExitStack() as stack:
        try:
            place = stack.enter_context(outside(62))
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr}")
        # At once, without a look whether somebody else has the address.
        for command in (
            f"address add {HERE_6}/64 dev {place.interface} nodad",
            f"-n {place.namespace} address add {THERE_6}/64 dev {place.far} nodad",
        ):
            run_ip(*command.split())
        yield place


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "token").touch(0o600)
    (home / "token").write_text(f"{TOKEN}\n")
    return home


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, place: Outside) -> tuple[Path, Path, Path]:
    """An authority's certificate; and a certificate of it for this host, with its key."""
    folder = tmp_path_factory.mktemp("tls")
    for name, more in (
        ("ca", ["-addext", "basicConstraints=critical,CA:TRUE"]),
        (
            "host",
            [
                *("-CA", "ca.crt", "-CAkey", "ca.key", "-addext", "basicConstraints=CA:FALSE"),
                *("-addext", f"subjectAltName=IP:{place.host_address}"),
            ],
        ),
    ):
        command = [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", f"/CN=lumed {name}", *more),
            *("-keyout", f"{name}.key", "-out", f"{name}.crt"),
        ]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=20)
    return folder / "ca.crt", folder / "host.crt", folder / "host.key"


def run_there(place: Outside, script: str, *arguments: str) -> list[str]:
    """The lines that a Python script prints on the other machine."""
    ended = subprocess.run(
        ["ip", "netns", "exec", place.namespace, sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def statuses(
    place: Outside, url: str, *headers: dict[str, str], ca: Path | None = None
) -> list[str]:
    lines = [json.dumps(each) for each in headers]
    return run_there(place, _STATUSES, url, "" if ca is None else str(ca), *lines)


def bearer(token: str = TOKEN, **more: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}", **more}


def port_of(server: Server) -> int:
    return httpx.URL(server.url).port or 0


def test_an_address_of_the_network_is_not_served_without_a_token(
    tmp_path: Path, place: Outside
) -> None:
    for host in (place.host_address, HERE_6):
        ended = run_lume("serve", "--port=0", f"--host={host}", f"--home={tmp_path / 'bare'}")
        assert_refused(ended, f"--host {host} can be reached from other machines", "--new-token")


def test_another_machine_needs_the_token_and_the_right_host(home: Path, place: Outside) -> None:
    with serving(home, f"--host={place.host_address}", quiet=False) as server:
        port = port_of(server)
        assert server.url == f"http://{place.host_address}:{port}"
        asked: list[tuple[dict[str, str], str]] = [
            ({}, "401"),
            (bearer("wrong"), "401"),
            (bearer(), "200"),
            (bearer(origin=server.url), "200"),
            # A page of a name that was rebound to this host, and one of another server there.
            (bearer(host=f"evil.example:{port}"), "403"),
            (bearer(host=f"{place.address}:{port}"), "403"),
            (bearer(origin="http://evil.example"), "403"),
        ]
        assert statuses(place, server.url, *(headers for headers, _ in asked)) == [
            status for _, status in asked
        ]


def test_the_python_client_works_and_watches_from_there_over_tls(
    home: Path, place: Outside, pair: tuple[Path, Path, Path]
) -> None:
    ca, certificate, key = pair
    arguments = (f"--host={place.host_address}", f"--tls-cert={certificate}", f"--tls-key={key}")
    with serving(home, *arguments) as server:
        assert statuses(place, server.url, {}, bearer(), ca=ca) == ["401", "200"]
        assert statuses(place, server.url, bearer()) == [""]
        life = run_there(place, _LIFE, server.url, TOKEN, str(ca))
        assert life == ["reset", "stopped", "vm-deleted"]


def test_all_addresses_or_one_of_ipv6_are_reached_from_there(home: Path, place: Outside) -> None:
    own_name: dict[str, Any] = {**bearer(), "host": socket.gethostname()}
    with serving(home, "--host=::", quiet=False) as server:
        port = port_of(server)
        for url in (f"http://{place.host_address}:{port}", f"http://[{HERE_6}]:{port}"):
            evil = bearer(host="evil.example")
            assert statuses(place, url, {}, bearer(), own_name, evil) == [
                *("401", "200", "200", "403")
            ]
    with serving(home, f"--host={HERE_6}", quiet=False) as server:
        assert server.url.startswith(f"http://[{HERE_6}]:")
        long = bearer(host="[fd77:0061:0:0:0:0:0:1]")
        other = bearer(host=f"[{THERE_6}]")
        assert statuses(place, server.url, {}, bearer(), long, other) == [
            *("401", "200", "200", "403")
        ]
        assert run_there(place, _LIFE, server.url, TOKEN, "") == [
            *("reset", "stopped", "vm-deleted")
        ]
