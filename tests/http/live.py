"""The API over fake machines, on a real port of this process: for tests that bring a client."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

import uvicorn

from lumed.http.app import build_app
from lumed.http.guard import Guard
from lumed.store.layout import Home
from tests.doubles.fake_driver import FakeDriver
from tests.http.conftest import end_machines, start_fake_engine


@contextlib.contextmanager
def serve_fake_engine(home: Home, driver: FakeDriver) -> Iterator[str]:
    """The URL of a server that runs in a thread until the end of the block."""
    server: uvicorn.Server | None = None
    port = 0
    ready = threading.Event()

    class Announcing(uvicorn.Server):
        async def main_loop(self) -> None:
            nonlocal port
            port = self.servers[0].sockets[0].getsockname()[1]
            ready.set()
            await super().main_loop()

    async def serve() -> None:
        nonlocal server
        async with start_fake_engine(home, driver) as engine:
            app = Guard(build_app(engine))
            config = uvicorn.Config(app, port=0, log_config=None, lifespan="off")
            server = Announcing(config)
            await server.serve()
        end_machines(driver)

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    try:
        assert ready.wait(10), "the server did not start"
        yield f"http://127.0.0.1:{port}"
    finally:
        if server is not None:
            server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
