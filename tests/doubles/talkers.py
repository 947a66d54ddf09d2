"""Servers that say what a test has them say, and leave nothing open behind them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def talk_at_path(talk: Talk, path: Path) -> AsyncIterator[None]:
    """Serve a unix socket at `path`; each connection is closed when `talk` returns."""
    async with _closing(talk) as serve, await asyncio.start_unix_server(serve, path):
        yield


@contextlib.asynccontextmanager
async def talk_at_port(talk: Talk, port: int = 0) -> AsyncIterator[tuple[str, int]]:
    """Serve a TCP port of 127.0.0.1, by default a free one; yields address and port."""
    async with _closing(talk) as serve:
        server = await asyncio.start_server(serve, "127.0.0.1", port)
        async with server:
            address: tuple[str, int] = server.sockets[0].getsockname()
            yield address


@contextlib.asynccontextmanager
async def _closing(talk: Talk) -> AsyncIterator[Talk]:
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await talk(reader, writer)
        except (asyncio.CancelledError, ConnectionError):
            pass  # the test is over, or the client has left
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    try:
        yield serve
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
