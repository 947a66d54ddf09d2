"""The floor of a list: uvicorn and Starlette with one reply that is ready-made, and nothing else.

`python -m bench.static_server FILE` prints where it listens.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


async def _serve(body: bytes) -> None:
    async def reply(_: Request) -> Response:
        return Response(body, media_type="application/json")

    app = Starlette(routes=[Route("/lume/vms", reply)])
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off")
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    await uvicorn.Server(config).serve(sockets=[listener])


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]).read_bytes()))
