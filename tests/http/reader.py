"""A client that reads an answer while it comes; httpx's ASGI transport waits for its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Scope


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event."""

    id: str
    kind: str
    data: dict[str, Any]


@dataclass(slots=True)
class Reader:
    """What an application has sent so far. `flows` cleared: the client reads no more."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    text: str = ""
    is_over: bool = False
    flows: asyncio.Event = field(default_factory=asyncio.Event)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _taken: int = 0

    async def send(self, message: Message) -> None:
        """The application's side."""
        await self.flows.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            pairs = message.get("headers", [])
            self.headers = {key.decode(): value.decode() for key, value in pairs}
        else:
            self.text += message.get("body", b"").decode()
            self.is_over = not message.get("more_body", False)
        self._news.set()

    async def wait_for(self, condition: Callable[[], object], timeout_s: float = 10) -> None:
        """Wait until what has come fulfils a condition."""
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            raise AssertionError(f"not within {timeout_s} s: {self.text!r}") from None

    async def next(self) -> Event:
        """The next event; comments are passed over."""
        while True:
            await self.wait_for(lambda: "\n\n" in self.text[self._taken :])
            end = self.text.index("\n\n", self._taken)
            block, self._taken = self.text[self._taken : end], end + 2
            lines = [line.partition(": ") for line in block.split("\n") if line[0] != ":"]
            if lines:
                fields = {name: value for name, _, value in lines}
                return Event(fields["id"], fields["event"], json.loads(fields["data"]))

    async def next_vm(self, name: str, **facts: object) -> Event:
        """The next event of a VM that has these facts; what comes before is passed over."""
        while True:
            event = await self.next()
            if (event.kind, event.data.get("name")) == ("vm", name) and all(
                event.data.get(key) == value for key, value in facts.items()
            ):
                return event


@contextlib.asynccontextmanager
async def reading(
    app: ASGIApp, path: str, headers: Mapping[str, str] | None = None
) -> AsyncIterator[Reader]:
    """GET a path and read it until the block ends; the client then hangs up."""
    reader = Reader()
    reader.flows.set()
    gone = asyncio.Event()
    asked = False

    async def receive() -> Message:
        nonlocal asked
        if asked:
            await gone.wait()
            return {"type": "http.disconnect"}
        asked = True
        return {"type": "http.request", "body": b"", "more_body": False}

    given = {"host": "localhost:7777", **(headers or {})}
    path, _, query = path.partition("?")
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(key.lower().encode(), value.encode()) for key, value in given.items()],
        "server": ("localhost", 7777),
        "client": ("127.0.0.1", 1),
    }

    async def ask() -> None:
        await app(scope, receive, reader.send)

    task = asyncio.create_task(ask())
    try:
        await reader.wait_for(lambda: reader.status)
        yield reader
    finally:
        gone.set()
        reader.flows.set()
        async with asyncio.timeout(10):
            await task
