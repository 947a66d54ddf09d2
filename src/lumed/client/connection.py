"""What the two clients share: where they connect, and what becomes of an answer."""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

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

    def make_tls(self) -> ssl.SSLContext:
        """What the server's certificate is checked with. Raises InvalidField."""
        try:
            return ssl.create_default_context(cafile=self.ca)
        except OSError as error:
            reason = f"{self.ca} holds no certificates: {error.strerror or error}"
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


def read_reply(call: Call[T], status: int, content: bytes) -> T:
    """The answer as the call's type. Raises what the server said."""
    if not 200 <= status < 300:
        raise read_error(status, _read_json(content))
    if not call.is_json:
        return call.parse(content)
    try:
        return call.parse(json.loads(content))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LumedError(
            f"The answer to {call.method} {call.path} cannot be understood: {error!r}",
            hint="is that a server of lumed, and no older than this client?",
        ) from error


def _read_json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


def say_ended(target: Target) -> ServerUnreachable:
    """The error for a stream that the server has closed."""
    return ServerUnreachable(f"The server on {target.shown} ended")


def explain_failure(
    target: Target,
    method: str,
    error: Exception,
    *,
    is_connected: bool = True,
    is_silent: bool = False,
) -> LumedError:
    """Why there is no answer."""
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return ServerUnreachable(
            f"The certificate of {target.shown} is not to be trusted: {error}",
            hint="name the one that it shall have: Client(url, ca=FILE)",
        )
    said = str(error) or type(error).__name__
    if not is_connected:
        return ServerUnreachable(
            f"No server answers on {target.shown}: {said}", hint="start one: lume serve"
        )
    if method not in _SAFE:
        return OutcomeUnknown(
            f"The server on {target.shown} did not say what came of the request: {said}",
            hint="look before you repeat it",
        )
    if is_silent:
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
