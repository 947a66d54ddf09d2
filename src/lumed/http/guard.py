"""What stands before every route: who may ask, how large, and under which path.

The API listens on loopback, where every web page in a browser on this host can send requests
too. Such requests carry a foreign `Host` (DNS rebinding), an `Origin`, or a content type other
than JSON, which a page may send without asking first; all are refused before anything happens.

Each listener has a guard of its own over the one application: it knows what is asked for there
(a token, on TCP) and in which words it is answered (`diskSize`, contract, section 3).
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
import socket
from dataclasses import dataclass
from urllib.parse import unquote

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lumed.errors import Unauthorized
from lumed.http.errors import error_body, error_response
from lumed.http.shapes import speaks_compat

MAX_BODY_BYTES = 2 * 1024 * 1024
_TOO_LARGE = f"The request body is larger than {MAX_BODY_BYTES // (1024 * 1024)} MB"
_ENDING = "The server ended before the answer was ready"
_AFTER_END = "start it again and look: GET /lume/vms"
_HOST = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?")
# Not what a page may send without asking first: forms, text, and whatever is to come.
_JSON = re.compile(r"application/([a-z0-9.+-]+\+)?json")
_WILDCARDS = frozenset({"0.0.0.0", "::"})  # noqa: S104 - compared with, not bound
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_WRITES = frozenset({"POST", "PUT", "PATCH", "DELETE"})
# The document prints these routes without the prefix in its headings.
_ALIASES = frozenset({"vms", "images"})


@dataclass(frozen=True, slots=True)
class Rules:
    """One listener's: hosts are the names, beside loopback's, that `Host` may hold."""

    hosts: frozenset[str] = frozenset()
    token: str | None = None
    compat: bool = False


class Guard:
    """ASGI middleware for one listener."""

    def __init__(self, app: ASGIApp, rules: Rules = Rules()) -> None:
        self._app = app
        self._token = None if rules.token is None else rules.token.encode()
        self._compat = rules.compat
        self._hosts = _LOOPBACK_NAMES | {host.lower() for host in rules.hosts}
        self._any_address = not self._hosts.isdisjoint(_WILDCARDS)
        if self._any_address:
            name = socket.gethostname().lower()
            self._hosts |= {name, name.partition(".")[0]}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._check(Headers(scope=scope), scope["method"], scope["scheme"])
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        # Every request is a task of its own, and so has its own.
        speaks_compat.set(self._compat)
        try:
            await self._app(_normalised(scope), _LimitedBody(receive), send)
        except asyncio.CancelledError:
            # The server ends and this request has outlived its patience: a body that does not
            # come, or a guest that does not go. Nothing was sent yet, since answers are whole.
            await JSONResponse(error_body(_ENDING, "server_ended", _AFTER_END), 503)(
                scope, receive, send
            )

    def _check(self, headers: Headers, method: str, scheme: str) -> JSONResponse | None:
        host = headers.get("host", "")
        if not self._is_ours(host):
            return _refused(
                f"Host {host!r:.100} is not this server's",
                403,
                hint="use the address that `lume serve` printed, or start it with --host",
            )
        origin = headers.get("origin")
        if origin is not None and origin != f"{scheme}://{host}":
            return _refused(f"Requests from the web page {origin!r:.100} are refused", 403)
        if self._token is not None and not _has_token(headers, self._token):
            return _unauthorized(headers)
        if method not in _WRITES:
            return None
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind and not _JSON.fullmatch(kind):
            return _refused(
                f"Content type {kind!r:.60} is refused",
                415,
                hint="send JSON: -H 'Content-Type: application/json'",
            )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            return JSONResponse(error_body(_TOO_LARGE, "too_large"), 413)
        return None

    def _is_ours(self, host: str) -> bool:
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = match[1].strip("[]").lower()
        if name in self._hosts:
            return True
        # An address cannot be rebound: who names one has looked up nothing. And one of IPv6 has
        # many spellings.
        address = _short_address(name)
        return address is not None and (self._any_address or address in self._hosts)


class _LimitedBody:
    """Counts a body that came without a length."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._left = MAX_BODY_BYTES

    async def __call__(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            # The one exception that FastAPI lets through where it reads bodies.
            raise HTTPException(413, _TOO_LARGE)
        return message


def _normalised(scope: Scope) -> Scope:
    """The scope with empty path parts dropped and the document's short paths completed."""
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    # Routes split at slashes, so an encoded one inside a name is shown by its look-alike: no
    # name can reach into another route, and no VM has such a name.
    parts = [unquote(part.decode("latin-1")).replace("/", "\u2215") for part in raw.split(b"/")]
    parts = [part for part in parts if part]
    if parts and parts[0] in _ALIASES:
        parts.insert(0, "lume")
    return {**scope, "path": "/" + "/".join(parts)}


def _short_address(name: str) -> str | None:
    """An IP address in its shortest spelling; None for a name that is none."""
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return None


def _has_token(headers: Headers, token: bytes) -> bool:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    # Takes as long for a token that is nearly right.
    same = hmac.compare_digest(given.strip().encode("latin-1"), token)
    return same and scheme.lower() == "bearer"


def _unauthorized(headers: Headers) -> JSONResponse:
    message = "The token is wrong" if "authorization" in headers else "A token is needed"
    hint = "send the server's: -H 'Authorization: Bearer TOKEN'; or use its unix socket"
    answer = error_response(Unauthorized(message, hint=hint))
    answer.headers["WWW-Authenticate"] = "Bearer"
    return answer


def refuse_user(uid: int) -> ASGIApp:
    """An application for a user who may not use the unix socket."""
    return _refused(
        f"The user with uid {uid} may not use this socket",
        403,
        hint="the socket is for the server's own user and root; others use the TCP port",
    )


def _refused(message: str, status: int, hint: str | None = None) -> JSONResponse:
    return JSONResponse(error_body(message, "refused", hint), status)
