"""What the two clients share: where they connect, and what becomes of an answer."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx2

from lumed.client.calls import Call
from lumed.client.discover import find_home, find_socket
from lumed.client.errors import ServerUnreachable, make_error, read_error
from lumed.errors import InvalidField, LumedError, OutcomeUnknown, TimedOut

if TYPE_CHECKING:
    from lumed.client.models import Operation

T = TypeVar("T")

CONNECT_S = 5.0
_SAFE = frozenset({"GET", "HEAD"})


@dataclass(frozen=True, slots=True)
class Target:
    """Where a server is: its URL and, if it is reached by one, its unix socket."""

    base_url: str
    socket: Path | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    ca: Path | None = None

    @property
    def shown(self) -> str:
        """For messages."""
        return str(self.socket or self.base_url.removesuffix("/lume"))

    @property
    def uds(self) -> str | None:
        """The socket's path, as httpx2 wants it."""
        return None if self.socket is None else str(self.socket)

    @property
    def verify(self) -> ssl.SSLContext | bool:
        """What certificates are checked with; a context with the usual ones takes 50 ms."""
        if self.base_url.startswith("https:"):
            return True if self.ca is None else _trust(self.ca)
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _trust(ca: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca)
    except OSError as error:
        reason = f"{ca} holds no certificates: {error.strerror or error}"
        raise InvalidField(f"ca: {reason}", fields={"ca": reason}) from error


def choose_target(
    url: str | None,
    socket: str | Path | None,
    home: str | Path | None,
    token: str | None,
    ca: str | Path | None,
) -> Target:
    """Where to connect: a URL, a socket, or the socket of a home's server."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    if url is not None:
        base = url.rstrip("/").removesuffix("/lume")
        if not base.startswith(("http://", "https://")):
            raise InvalidField(
                f"url: {url!r:.80} begins with neither http:// nor https://",
                fields={"url": "not http"},
            )
        return Target(f"{base}/lume", None, headers, None if ca is None else Path(ca))
    path = Path(socket) if socket is not None else find_socket(find_home(home)[0])
    return Target("http://localhost/lume", path, headers)


def open_http(target: Target) -> httpx2.Client:
    """An HTTP client for it. A proxy of the environment is not for servers of this host."""
    transport = httpx2.HTTPTransport(uds=target.uds, verify=target.verify)
    return httpx2.Client(base_url=target.base_url, headers=target.headers, transport=transport)


def open_async_http(target: Target) -> httpx2.AsyncClient:
    """The same for asyncio."""
    transport = httpx2.AsyncHTTPTransport(uds=target.uds, verify=target.verify)
    return httpx2.AsyncClient(base_url=target.base_url, headers=target.headers, transport=transport)


def plan_request(call: Call[T], key: str | None, silence_s: float | None = -1) -> dict[str, Any]:
    """The arguments for httpx2's `request` and `stream`.

    key is an Idempotency-Key. silence_s is how long the answer may pause; -1: as the call has it.
    """
    read_s = call.timeout_s if silence_s == -1 else silence_s
    return {
        "method": call.method,
        "url": call.path,
        "params": call.params,
        "json": call.body,
        "headers": {"Idempotency-Key": key} if key else None,
        "timeout": httpx2.Timeout(call.timeout_s, connect=CONNECT_S, read=read_s),
    }


def read_reply(call: Call[T], reply: httpx2.Response) -> T:
    """The answer as the call's type. Raises what the server said."""
    if not reply.is_success:
        raise read_error(reply.status_code, _read_json(reply))
    if not call.is_json:
        return call.parse(reply.content)
    try:
        return call.parse(reply.json())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LumedError(
            f"The answer to {call.method} {call.path} cannot be understood: {error!r}",
            hint="is that a server of lumed, and no older than this client?",
        ) from error


def _read_json(reply: httpx2.Response) -> Any:
    try:
        return reply.json()
    except ValueError:
        return None


def say_ended(target: Target) -> ServerUnreachable:
    """The error for a stream that the server has closed."""
    return ServerUnreachable(f"The server on {target.shown} ended")


def explain_failure(target: Target, method: str, error: httpx2.TransportError) -> LumedError:
    """Why there is no answer."""
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return ServerUnreachable(
            f"The certificate of {target.shown} is not to be trusted: {error}",
            hint="name the one that it shall have: Client(url, ca=FILE)",
        )
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.UnsupportedProtocol):
        return ServerUnreachable(
            f"No server answers on {target.shown}: {error or type(error).__name__}",
            hint="start one: lume serve",
        )
    said = str(error) or type(error).__name__
    if method not in _SAFE:
        return OutcomeUnknown(
            f"The server on {target.shown} did not say what came of the request: {said}",
            hint="look before you repeat it",
        )
    if isinstance(error, httpx2.TimeoutException):
        return TimedOut(f"The server on {target.shown} did not answer in time")
    return ServerUnreachable(f"The server on {target.shown} went away: {said}")


def check_outcome(operation: Operation) -> Operation:
    """The operation, if it succeeded. Raises what it failed with."""
    if operation.failure is not None:
        failure = operation.failure
        raise make_error(failure.code, failure.message, failure.hint)
    if operation.is_over and operation.status != "succeeded":
        raise make_error(
            operation.status,
            f"The {operation.action} of {operation.target} was {operation.status}",
            None,
        )
    return operation
