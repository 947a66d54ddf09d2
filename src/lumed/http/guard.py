"""What stands before every route: who may ask, how large, and under which path.

The API listens on loopback, where every web page in a browser on this host can send requests
too. Such requests carry a foreign `Host` (DNS rebinding), an `Origin`, or one of the content
types that a page may send without asking first; all are refused before anything happens.
"""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lumed.http.errors import error_body

MAX_BODY_BYTES = 2 * 1024 * 1024
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_WRITES = frozenset({"POST", "PUT", "PATCH", "DELETE"})
# The document prints these routes without the prefix in its headings.
_ALIASES = frozenset({"vms", "images"})


class Guard:
    """ASGI middleware; hosts are the names, beside loopback's, that `Host` may hold."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str] = frozenset()) -> None:
        self._app = app
        self._hosts = _LOOPBACK_NAMES | {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._check(Headers(scope=scope), scope["method"])
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        limited = _LimitedBody(receive)
        try:
            await self._app(_normalised(scope), limited, send)
        except _TooLarge:
            # Nothing was answered yet: bodies are read whole before a route runs.
            await _too_large()(scope, receive, send)

    def _check(self, headers: Headers, method: str) -> JSONResponse | None:
        host = _host_name(f"//{headers.get('host', '')}")
        if host not in self._hosts:
            return _refused(f"Host {headers.get('host', '')!r:.100} is not this server's", 403)
        origin = headers.get("origin")
        if origin is not None and origin != f"http://{headers['host']}":
            return _refused(f"Requests from the web page {origin!r:.100} are refused", 403)
        if method not in _WRITES:
            return None
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind.startswith(("text/", "multipart/")) or kind == "application/x-www-form-urlencoded":
            return _refused(
                f"Content type {kind!r:.60} is refused",
                415,
                hint="send JSON: -H 'Content-Type: application/json'",
            )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            return _too_large()
        return None


class _TooLarge(Exception):
    pass


class _LimitedBody:
    """Counts a body that came without a length."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._left = MAX_BODY_BYTES

    async def __call__(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise _TooLarge
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


def _host_name(netloc: str) -> str | None:
    try:
        return urlsplit(netloc).hostname
    except ValueError:
        return None


def _refused(message: str, status: int, hint: str | None = None) -> JSONResponse:
    return JSONResponse(error_body(message, "refused", hint), status)


def _too_large() -> JSONResponse:
    limit = MAX_BODY_BYTES // (1024 * 1024)
    return JSONResponse(error_body(f"The request body is larger than {limit} MB", "too_large"), 413)
