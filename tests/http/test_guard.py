"""What a web page in a browser on this host could send is refused before anything happens."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import httpx2 as httpx
import pytest

from lumed.http.app import build_app
from lumed.http.guard import Rules
from lumed.service.local import LocalEngine
from tests.http.conftest import Client, connect

SMALL = {"name": "web", "os": "linux", "cpu": 1, "memory": "64MB", "diskSize": "64MB"}
VMS = "/lume/vms"
WRITES = (
    ("POST", VMS),
    ("POST", "/lume/vms/web/run"),
    ("POST", "/lume/vms/web/stop"),
    ("PUT", "/lume/vms/web"),
    ("PATCH", "/lume/vms/web"),
    ("DELETE", "/lume/vms/web"),
    ("POST", "/lume/config"),
    ("POST", "/lume/config/locations"),
    ("DELETE", "/lume/config/locations/fast"),
    ("POST", "/lume/operations/op-1/cancel"),
)
PAGES = ("/docs", "/openapi.json", VMS, "/lume/config", "/lume/logs", "/lume/host/status")


async def assert_untouched(client: Client) -> None:
    assert (await client.get(VMS)).json() == []
    assert (await client.get("/lume/operations")).json() == []
    locations = (await client.get("/lume/config/locations")).json()
    assert "fast" not in {location["name"] for location in locations}


def assert_refused(reply: httpx.Response, status: int) -> None:
    assert reply.status_code == status, reply.text
    body = reply.json()
    assert body["code"] == "refused"
    assert body["message"] == body["error"]


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:7777",
        "localhost.evil.example:7777",
        "localhost.:7777",
        "127.0.0.1.evil.example",
        "127.0.0.2:7777",
        "[::2]:7777",
        "[::1",
        "2130706433:7777",
        "evil@localhost:7777",
        "localhost/evil",
        "localhost:7777:1",
        "",
    ],
)
async def test_a_foreign_host_is_refused(client: Client, host: str) -> None:
    for path in PAGES:
        assert_refused(await client.get(path, headers={"host": host}), 403)
    for method, path in WRITES:
        reply = await client.request(method, path, json=SMALL, headers={"host": host})
        assert_refused(reply, 403)
    await assert_untouched(client)


async def test_a_request_without_a_host_is_refused(client: Client) -> None:
    request = client.build_request("GET", VMS)
    del request.headers["host"]
    assert_refused(await client.send(request), 403)


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST:7777", "127.0.0.1:7777", "localhost:1"),
        *("[::1]:7777", "[0:0:0:0:0:0:0:1]:7777"),
    ],
)
async def test_loopback_names_are_ours_at_any_port(client: Client, host: str) -> None:
    for path in PAGES:
        assert (await client.get(path, headers={"host": host})).status_code == 200


async def test_a_server_on_all_addresses_is_reached_by_any_address_and_no_other_name(
    engine: LocalEngine,
) -> None:
    rules = Rules(frozenset({"0.0.0.0"}))  # noqa: S104
    async with connect(build_app(engine), rules, url="http://192.0.2.7:7777") as client:
        for host in ("192.0.2.7:7777", "[2001:db8::1]:7777", "localhost", socket.gethostname()):
            assert (await client.get(VMS, headers={"host": host})).status_code == 200
        assert_refused(await client.get(VMS, headers={"host": "evil.example:7777"}), 403)


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "",
        "http://localhost:8000",
        "https://localhost:7777",
        "http://127.0.0.1:7777",
        "http://localhost:7777.evil.example",
    ],
)
async def test_a_foreign_origin_is_refused(client: Client, origin: str) -> None:
    for path in PAGES:
        assert_refused(await client.get(path, headers={"origin": origin}), 403)
    for method, path in WRITES:
        reply = await client.request(method, path, json=SMALL, headers={"origin": origin})
        assert_refused(reply, 403)
    await assert_untouched(client)


async def test_the_own_docs_page_may_write(client: Client) -> None:
    headers = {"origin": "http://localhost:7777"}
    assert (await client.post(VMS, json=SMALL, headers=headers)).status_code == 202


@pytest.mark.parametrize(
    "kind",
    [
        "application/x-www-form-urlencoded",
        "application/x-www-form-urlencoded; charset=UTF-8",
        "multipart/form-data; boundary=x",
        "text/plain",
        "text/plain;charset=utf-8",
        "TEXT/PLAIN",
        " text/plain ; x=application/json",
        "text/json",
        "application/octet-stream",
    ],
)
@pytest.mark.parametrize("body", [b"", b'{"name": "web"}'], ids=["empty", "json"])
async def test_a_body_that_is_not_called_json_is_refused(
    client: Client, kind: str, body: bytes
) -> None:
    for method, path in WRITES:
        reply = await client.request(method, path, content=body, headers={"content-type": kind})
        assert_refused(reply, 415)
        assert "application/json" in reply.json()["hint"]
    await assert_untouched(client)


@pytest.mark.parametrize(
    "kind",
    [
        "application/json",
        "application/json; charset=utf-8",
        "Application/JSON",
        "application/merge-patch+json",
        "",
        None,
    ],
)
async def test_json_may_be_called_json_or_nothing(client: Client, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    content = b'{"name": "web", "os": "linux", "cpu": 1, "memory": "64MB", "diskSize": "64MB"}'
    reply = await client.post(VMS, content=content, headers=headers)
    assert reply.status_code == 202, reply.text
    reply = await client.post("/lume/vms/other/stop", headers=headers)
    assert reply.status_code == 404


async def test_no_page_of_another_origin_is_told_that_it_may(client: Client) -> None:
    headers = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type",
    }
    reply = await client.options(VMS, headers=headers)
    assert reply.status_code == 405
    assert not [name for name in reply.headers if name.startswith("access-control")]


async def in_chunks(total: int) -> AsyncIterator[bytes]:
    for _ in range(total // 65536):
        yield b" " * 65536


async def test_a_body_of_20_mb_is_refused_with_and_without_its_length(client: Client) -> None:
    json = {"content-type": "application/json"}
    for path in (VMS, "/lume/config", "/lume/vms/web/run"):
        for content in (b" " * 20_000_000, in_chunks(20_000_000)):
            reply = await client.post(path, content=content, headers=json)
            assert reply.status_code == 413
            assert reply.json()["code"] == "too_large"
            assert "2 MB" in reply.json()["message"]
    for length in ("-1", "x", "1e3"):
        odd = json | {"content-length": length}
        request = client.build_request("POST", VMS, content=b"{}", headers=odd)
        assert (await client.send(request)).status_code == 413


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "TRACE", "PUT", "BREW"])
async def test_other_methods_are_refused_in_json(client: Client, method: str) -> None:
    for path, status, code in ((VMS, 405, "wrong_method"), ("/x", 404, "unknown_route")):
        reply = await client.request(method, path)
        assert reply.status_code == status
        assert reply.headers["content-type"] == "application/json"
        if method != "HEAD":
            assert reply.json()["code"] == code


ROUTES = [
    ("GET", "/lume/vms", 200),
    ("GET", "/lume/vms/web", 404),
    ("PUT", "/lume/vms/web", 404),
    ("PATCH", "/lume/vms/web", 404),
    ("POST", "/lume/vms/web/update", 404),
    ("POST", "/lume/vms/web/run", 404),
    ("POST", "/lume/vms/web/stop", 404),
    ("GET", "/lume/vms/web/screenshot", 404),
    ("DELETE", "/lume/vms/web", 404),
    ("POST", "/lume/vms", 422),
    ("POST", "/lume/vms/clone", 422),
    ("POST", "/lume/vms/push", 422),
    ("POST", "/lume/vms/web/setup", 404),
    ("POST", "/lume/images/pull", 422),
    ("POST", "/lume/pull", 422),
    ("POST", "/lume/pull/start", 422),
    ("POST", "/lume/pull/cancel", 422),
    ("GET", "/lume/images", 200),
    ("POST", "/lume/images/build", 422),
    ("DELETE", "/lume/images/none", 404),
    ("POST", "/lume/prune", 200),
    ("GET", "/lume/ipsw", 501),
    ("GET", "/lume/operations", 200),
    ("GET", "/lume/operations/op-1", 404),
    ("POST", "/lume/operations/op-1/cancel", 404),
    ("GET", "/lume/host/status", 200),
    ("GET", "/lume/logs", 200),
    ("GET", "/lume/config", 200),
    ("POST", "/lume/config", 200),
    ("GET", "/lume/config/locations", 200),
    ("POST", "/lume/config/locations/default/nowhere", 404),
    ("DELETE", "/lume/config/locations/nowhere", 404),
    ("GET", "/openapi.json", 200),
    ("GET", "/docs", 200),
]


@pytest.mark.parametrize(("method", "path", "status"), ROUTES)
async def test_every_route_is_found_however_it_is_spelt(
    client: Client, method: str, path: str, status: int
) -> None:
    plain = await client.request(method, path, json={})
    assert plain.status_code == status, plain.text
    encoded = "/" + "".join(c if c == "/" else f"%{ord(c):02x}" for c in path[1:])
    spellings = [path + "/", path + "//", "/" + path, path.replace("/", "//"), encoded]
    if path.startswith(("/lume/vms", "/lume/images")):
        spellings.append(path.removeprefix("/lume"))
    for spelling in spellings:
        for query in ("", "?x=y", "?a/b=c%2Fd"):
            # A base of its own, since "//lume" alone would be a host.
            url = f"http://localhost:7777{spelling}{query}"
            reply = await client.request(method, url, json={})
            assert reply.status_code == status, (url, reply.text)
            if status != 200:
                assert reply.json() == plain.json()
