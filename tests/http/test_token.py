"""A listener with a token answers nobody who does not send it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx2 as httpx
import pytest
from starlette.types import Message

from lumed.http.app import build_app
from lumed.http.guard import Guard, Rules
from lumed.service.local import LocalEngine
from tests.http.conftest import Client, connect
from tests.http.test_guard import PAGES, SMALL, VMS, WRITES, assert_refused, assert_untouched

TOKEN = "v3ry-s3cret_token"


@pytest.fixture
async def client(engine: LocalEngine) -> AsyncIterator[Client]:
    """Without a token, on a listener that wants one."""
    async with connect(build_app(engine), Rules(token=TOKEN)) as client:
        yield client


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def assert_unauthorized(reply: httpx.Response) -> None:
    assert reply.status_code == 401, reply.text
    assert reply.headers["www-authenticate"] == "Bearer"
    assert reply.headers["content-type"] == "application/json"
    if reply.request.method == "HEAD":
        return
    body = reply.json()
    assert body["code"] == "unauthorized"
    assert body["message"] == body["error"]
    assert "Authorization: Bearer" in body["hint"]
    assert TOKEN not in reply.text


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer(""),
        bearer("wrong"),
        bearer(TOKEN[:-1]),
        bearer(TOKEN + "x"),
        bearer(TOKEN.upper()),
        bearer(f'"{TOKEN}"'),
        {"authorization": TOKEN},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": f"Bearer{TOKEN}"},
        {"x-authorization": f"Bearer {TOKEN}"},
        {"cookie": f"token={TOKEN}"},
        {"authorization": "Bearer \xff\xfe\x80"},
    ],
    ids=str,
)
async def test_whoever_has_no_token_is_refused_everywhere(
    client: Client, headers: dict[str, str]
) -> None:
    odd = httpx.Headers([(key.encode(), text.encode("latin-1")) for key, text in headers.items()])
    for path in (*PAGES, "/", "/nothing"):
        assert_unauthorized(await client.get(path, headers=odd))
    for method, path in (*WRITES, ("OPTIONS", VMS), ("HEAD", VMS), ("BREW", VMS)):
        assert_unauthorized(await client.request(method, path, json=SMALL, headers=odd))
    client.headers = httpx.Headers(bearer(TOKEN))
    await assert_untouched(client)


async def test_a_token_in_the_query_is_none(client: Client) -> None:
    assert_unauthorized(await client.get(f"{VMS}?token={TOKEN}&access_token={TOKEN}"))


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer "])
async def test_whoever_has_the_token_is_answered(client: Client, scheme: str) -> None:
    client.headers = httpx.Headers({"authorization": f"{scheme} {TOKEN}"})
    for path in PAGES:
        assert (await client.get(path)).status_code == 200
    assert (await client.post(VMS, json=SMALL)).status_code == 202


async def test_the_token_is_looked_at_before_the_body(engine: LocalEngine) -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        raise AssertionError("the body was read")

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "scheme": "http", "path": VMS, "query_string": b""}
    headers = [(b"host", b"localhost"), (b"content-length", b"1000000")]
    guard = Guard(build_app(engine), Rules(token=TOKEN))
    await guard({**scope, "headers": headers}, receive, send)
    assert sent[0]["status"] == 401


async def test_a_token_opens_nothing_to_a_foreign_page(client: Client) -> None:
    for headers in ({"host": "evil.example"}, {"origin": "http://evil.example"}):
        assert_refused(await client.get(VMS, headers={**bearer(TOKEN), **headers}), 403)
        # And without one, no page learns whether there is a token.
        assert_refused(await client.get(VMS, headers=headers), 403)


async def test_over_tls_the_own_page_is_an_https_one(engine: LocalEngine) -> None:
    async with connect(build_app(engine), url="https://localhost:7777") as client:
        own = {"origin": "https://localhost:7777"}
        assert (await client.get(VMS, headers=own)).status_code == 200
        assert_refused(await client.get(VMS, headers={"origin": "http://localhost:7777"}), 403)


async def test_the_documentation_tells_of_the_token(client: Client) -> None:
    document = (await client.get("/openapi.json", headers=bearer(TOKEN))).json()
    for path in document["paths"].values():
        for operation in path.values():
            assert "401" in operation["responses"]
