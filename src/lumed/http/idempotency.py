"""The `Idempotency-Key` of a write: whoever sends it again has the same answer.

See the IETF's draft-ietf-httpapi-idempotency-key-header. Kept are answers that say what was done
or refused: 2xx and 4xx. A fault (5xx) and another action that is under way (`busy`) say nothing
of the kind, and a retry may fare better.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lumed.engine import Engine
from lumed.errors import Busy, InvalidField, LumedError
from lumed.http.errors import error_response
from lumed.http.shapes import speaks_compat
from lumed.model.answer import Answer

_WRITES = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_KEY = re.compile(r"[!-~]{1,255}")
_JSON = "application/json"


class Idempotency:
    """ASGI middleware, behind the guard."""

    def __init__(self, app: ASGIApp, engine: Engine) -> None:
        self._app = app
        self._engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http" or scope["method"] not in _WRITES:
            await self._app(scope, receive, send)
            return
        keys = Headers(scope=scope).getlist("idempotency-key")
        if not keys:
            await self._app(scope, receive, send)
            return
        try:
            response = await self._carry_out_once(_check_key(keys), scope, receive)
        except LumedError as error:
            response = error_response(error)
        await response(scope, receive, send)

    async def _carry_out_once(self, key: str, scope: Scope, receive: Receive) -> Response:
        body = _Body(receive)
        fingerprint = _fingerprint(scope, await body.read())
        async with self._engine.once(key, fingerprint) as request:
            if (answer := request.answer) is not None:
                headers = {"Idempotency-Replayed": "true"}
                return Response(answer.body, answer.status, headers, media_type=_JSON)
            taken = _Taken()
            await self._app(scope, body.replay, taken.send)
            if request.was_cut_off and taken.status in (404, 409):
                return _explain_cut(taken)
            if _is_final(taken):
                request.kept = Answer(taken.status, taken.body)
        # Not before the record: a client that has its answer can count on it.
        return taken.response()


class _Body:
    """A request's body, read before it is handed on."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._messages: list[Message | HTTPException] = []

    async def read(self) -> bytes:
        """All of it; what breaks it off is raised again where the routes read it."""
        body = b""
        while True:
            try:
                message = await self._receive()
            except HTTPException as error:
                self._messages.append(error)
                return body
            self._messages.append(message)
            part: bytes = message.get("body", b"")
            body += part
            if not message.get("more_body", False):
                return body

    async def replay(self) -> Message:
        """Receive, for the routes."""
        if not self._messages:
            return await self._receive()
        message = self._messages.pop(0)
        if isinstance(message, HTTPException):
            raise message
        return message


class _Taken:
    """An answer that has not gone out yet."""

    def __init__(self) -> None:
        self.status = 0
        self.body = b""
        self._headers: Iterable[tuple[bytes, bytes]] = ()

    async def send(self, message: Message) -> None:
        """Send, for the routes."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._headers = message.get("headers", ())
        else:
            self.body += message.get("body", b"")

    def response(self, body: bytes | None = None) -> Response:
        """The answer, with another body if one is given."""
        response = Response(self.body if body is None else body, self.status)
        own = [(key, value) for key, value in self._headers if key != b"content-length"]
        response.raw_headers = [*own, *response.raw_headers]
        return response


def _check_key(keys: list[str]) -> str:
    if len(keys) == 1 and _KEY.fullmatch(keys[0]):
        return keys[0]
    reason = "it must be one of 1 to 255 visible ASCII characters, such as a UUID"
    raise InvalidField(f"Idempotency-Key: {reason}", fields={"Idempotency-Key": reason})


def _fingerprint(scope: Scope, body: bytes) -> str:
    # The guard has made one path of all its spellings.
    target = (scope["method"].encode(), scope["path"].encode(), scope["query_string"])
    # The other listener's answer has another shape, so a replay must not cross over.
    parts = (*target, b"compat" if speaks_compat.get() else b"", body)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"%d:%s" % (len(part), part))
    return digest.hexdigest()


def _is_final(taken: _Taken) -> bool:
    if taken.status == 409 and json.loads(taken.body).get("code") == Busy.code:
        return False
    return 200 <= taken.status < 500


def _explain_cut(taken: _Taken) -> Response:
    error = json.loads(taken.body)
    error["hint"] = (
        "this request came before, and the server ended before it was answered: "
        "it may have been carried out then"
    )
    return taken.response(json.dumps(error, separators=(",", ":")).encode())
