"""Answers that wait: until something happens, the client leaves, or the server ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")


async def wait_unless(ending: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """What work returns; None if `ending` is set first, and work is then cancelled."""
    task = asyncio.create_task(work)
    await _first_of(task, asyncio.create_task(ending.wait()))
    return None if task.cancelled() else task.result()


class StreamReply(Response):
    """An answer of unknown length; its parts end with the client or with the server.

    A client that reads slowly holds up its own parts only, and no memory is filled for it.
    """

    def __init__(
        self,
        parts: AsyncGenerator[bytes, None],
        ending: asyncio.Event,
        media_type: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # As Starlette's own StreamingResponse: without a body there is no length to tell.
        self.status_code = 200
        self.media_type = media_type
        self.background = None
        self.init_headers(headers)
        self._parts = parts
        self._ending = ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        writing = asyncio.create_task(self._write(send))
        leaving = asyncio.create_task(_wait_disconnect(receive))
        try:
            await _first_of(writing, leaving, asyncio.create_task(self._ending.wait()))
        except asyncio.CancelledError:
            # The server has waited long enough for a client that reads nothing.
            return
        if not writing.cancelled() and (fault := writing.exception()) is not None:
            raise fault
        if not leaving.done() or leaving.cancelled():
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, send: Send) -> None:
        async with contextlib.aclosing(self._parts) as parts:
            async for part in parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})


async def _wait_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _first_of(*tasks: asyncio.Task[Any]) -> None:
    """Wait for the first of these tasks, and end the others."""
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
