"""GET /lume/events: what changes, as server-sent events (WHATWG HTML, 9.2)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response

from lumed.engine import Engine
from lumed.http.bodies import VmName
from lumed.http.shapes import operation_object, vm_object
from lumed.http.streams import StreamReply
from lumed.model.notice import Notice

_STREAM = "text/event-stream"
# Proxies and clients take a connection that is silent for long for a dead one.
_SILENCE_S = 15.0
_EXAMPLE = """id: 1f3a9c02-17
event: vm
data: {"name":"web","state":"running","locationName":"home"}

"""


def event_routes(engine: Engine, ending: asyncio.Event) -> APIRouter:
    """/lume/events."""
    router = APIRouter(prefix="/lume", tags=["events"])

    @router.get(
        "/events",
        response_class=Response,
        responses={
            200: {
                "description": "`vm`, `vm-deleted` and `operation` with the object as its GET "
                "has it; `reset`: list anew, all that changes from here on follows",
                "content": {_STREAM: {"schema": {"type": "string"}, "example": _EXAMPLE}},
            }
        },
        summary="What changes, as it changes (server-sent events)",
    )
    async def watch_events(
        vm: Annotated[
            VmName | None, Query(description="Only what concerns the VM of that name")
        ] = None,
        last_event_id: Annotated[
            str | None, Header(description="The id of the last event that came before")
        ] = None,
        last_event_id_in_query: Annotated[str | None, Query(alias="lastEventId")] = None,
    ) -> Response:
        after = last_event_id or last_event_id_in_query or None
        return StreamReply(_tell(engine, after, vm), ending, _STREAM, {"Cache-Control": "no-store"})

    return router


async def _tell(engine: Engine, after: str | None, vm: str | None) -> AsyncGenerator[bytes, None]:
    async with engine.watch(after, vm) as watch:
        yield b": watching\n\n"
        while True:
            notices = await watch.wait(_SILENCE_S)
            yield b"".join(map(_encode, notices)) or b": still here\n\n"


def _encode(notice: Notice) -> bytes:
    text = json.dumps(_data_of(notice), separators=(",", ":"), ensure_ascii=False)
    event = f"id: {notice.id}\nevent: {notice.kind}\ndata: {text}\n\n"
    return event.encode("utf-8", errors="backslashreplace")


def _data_of(notice: Notice) -> dict[str, Any]:
    if notice.vm is not None:
        return vm_object(notice.vm)
    if notice.operation is not None:
        return operation_object(notice.operation)
    return {"reason": notice.reason}
