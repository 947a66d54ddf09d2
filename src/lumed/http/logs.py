"""The routes of logs: the server's, and what a guest and its QEMU print."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response

from lumed.engine import Engine
from lumed.errors import InvalidField
from lumed.http.replies import LogsObject, VmLogsObject
from lumed.http.shapes import json_response
from lumed.http.streams import StreamReply
from lumed.http.vms import Name, Storage, vm_name

_TEXT = "text/plain"
# Beside the JSON of the model.
_FOLLOWED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The logs; with `follow` one of them as text that goes on",
        "content": {_TEXT: {"schema": {"type": "string"}}},
    }
}
Lines = Annotated[int | None, Query(ge=1, le=100_000, description="The last lines only")]
Follow = Annotated[
    bool, Query(description="Go on with what is written, as text, until the client leaves")
]


def log_routes(engine: Engine, ending: asyncio.Event) -> APIRouter:
    """/lume/logs and /lume/vms/{name}/logs."""
    router = APIRouter(prefix="/lume", tags=["logs"])

    def stream(parts: AsyncGenerator[bytes, None]) -> Response:
        return StreamReply(parts, ending, _TEXT, {"Cache-Control": "no-store"})

    @router.get(
        "/logs", response_model=LogsObject, responses=_FOLLOWED, summary="The server's own logs"
    )
    async def get_logs(
        type: Literal["info", "error", "all"] | None = None,
        lines: Lines = None,
        follow: Follow = False,
    ) -> Response:
        if follow:
            return stream(engine.follow_log(_one_of(type, "info"), lines))
        return json_response(await engine.read_logs(type or "all", lines))

    @router.get(
        "/vms/{name}/logs",
        response_model=VmLogsObject,
        responses=_FOLLOWED,
        summary="The serial console of a virtual machine, and QEMU's own log",
    )
    async def get_vm_logs(
        name: Name,
        type: Literal["serial", "qemu", "all"] | None = None,
        lines: Lines = None,
        follow: Follow = False,
        storage: Storage = None,
    ) -> Response:
        place = storage or None
        if follow:
            kind = _one_of(type, "serial")
            return stream(await engine.follow_vm_log(vm_name(name), place, kind, lines))
        logs = await engine.read_vm_logs(vm_name(name), place, type or "all", lines)
        return json_response(logs)

    return router


def _one_of(kind: str | None, default: str) -> str:
    if kind == "all":
        reason = "one log can be followed at a time"
        raise InvalidField(f"type: {reason}", fields={"type": reason})
    return kind or default
