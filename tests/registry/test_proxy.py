"""Registries behind the proxies of the environment."""

from __future__ import annotations

import base64
import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from lumed.errors import RegistryFailed
from tests.registry.faults import FaultProxy
from tests.registry.test_registry import BLOB, REPOSITORY, connect, read_all, refer
from tests.registry.world import Layer, RunningRegistry

HOST = "registry.example"


@contextlib.contextmanager
def tunnel(to: str, answer: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A proxy for one CONNECT, wherever to: its address, and what it was asked."""
    asked: list[bytes] = []
    host, _, port = to.partition(":")

    def copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def serve() -> None:
        with contextlib.suppress(OSError), server.accept()[0] as client:
            request = b""
            while not request.endswith(b"\r\n\r\n"):
                request += client.recv(1)
            asked.append(request)
            client.sendall(answer)
            if b" 200 " in answer:
                with socket.create_connection((host, int(port))) as upstream:
                    back = threading.Thread(target=copy, args=(upstream, client))
                    back.start()
                    copy(client, upstream)
                    back.join(10)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}", asked
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def test_plain_http_goes_through_the_proxy_by_full_urls(
    registry: RunningRegistry, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.store_image(f"{REPOSITORY}:1", [Layer(BLOB)])
    monkeypatch.setenv("http_proxy", f"http://us%40er:pw@{proxy.host}")
    with connect(HOST, insecure=[HOST]) as client:
        assert read_all(client) == BLOB
    assert proxy.requests[-1].target.startswith(f"http://{HOST}/v2/{REPOSITORY}/blobs/")
    login = base64.b64encode(b"us@er:pw").decode()
    assert proxy.requests[-1].headers["Proxy-Authorization"] == f"Basic {login}"


def test_tls_goes_through_a_tunnel(
    tls_registry: RunningRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tls_registry.store_image(f"{REPOSITORY}:1", [Layer(BLOB)])
    monkeypatch.setenv("SSL_CERT_FILE", str(tls_registry.ca))
    with tunnel(tls_registry.host, b"HTTP/1.1 200 fine\r\nX: y\r\n\r\n") as (host, asked):
        monkeypatch.setenv("https_proxy", f"http://user:pw@{host}")
        with connect(HOST) as client:
            assert client.get_manifest(refer(HOST), ["amd64"]).digest == image
            assert read_all(client) == BLOB
    (request,) = asked
    assert request.startswith(
        b"CONNECT registry.example:443 HTTP/1.1\r\nHost: registry.example:443"
    )
    assert b"\r\nProxy-Authorization: Basic dXNlcjpwdw==\r\n" in request


def test_a_proxy_that_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with tunnel("127.0.0.1:1", b"HTTP/1.1 407 Who are you\r\n\r\n") as (host, _):
        monkeypatch.setenv("https_proxy", f"http://user:geheim@{host}")
        with (
            connect(HOST) as client,
            pytest.raises(RegistryFailed, match=r"does not connect .*407 Who are you") as caught,
        ):
            client.get_manifest(refer(HOST), ["amd64"])
        assert host in str(caught.value)
        assert "geheim" not in str(caught.value)


def test_another_kind_of_proxy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "socks5://127.0.0.1:1")
    with connect(HOST) as client, pytest.raises(RegistryFailed, match="scheme 'socks5'"):
        client.get_manifest(refer(HOST), ["amd64"])


def test_loopback_and_no_proxy_go_around_it(
    registry: RunningRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = registry.store_image(f"{REPOSITORY}:1", [Layer(BLOB)])
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with connect(registry.host) as client:
        assert client.get_manifest(refer(registry.host), ["amd64"]).digest == image
    monkeypatch.setenv("no_proxy", ".invalid")
    with (
        connect("nowhere.invalid") as client,
        pytest.raises(RegistryFailed, match=r"nowhere\.invalid"),
    ):
        client.get_manifest(refer("nowhere.invalid"), ["amd64"])
