"""Requests to one registry: logins, redirects, further tries. Blocks; made for worker threads.

RFC 9110; the distribution project's "Token Authentication Specification".
"""

from __future__ import annotations

import http.client
import json
import random
import re
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from urllib.parse import urlencode, urlsplit

from lumed import __version__
from lumed.errors import RegistryFailed
from lumed.images.auth import (
    Challenge,
    Credentials,
    Token,
    find_credentials,
    parse_challenges,
    parse_token,
)
from lumed.images.connection import Connection, NoTls, Origin, join_url, parse_url
from lumed.images.oci import ConnectionLost
from lumed.threads import Stopped

MAX_ERROR_BYTES = 64 << 10
# Tries of one request, and breaks of one upload without progress.
TRIES = 5
BUSY = frozenset({408, 429, 500, 502, 503, 504})
LOGINS = 2  # for one request: a token may run out between its issue and its use
USER_AGENT = f"lumed/{__version__}"

_MOST_REDIRECTS = 5
_LONGEST_RETRY_AFTER_S = 60.0
_MAX_TOKEN_BYTES = 1 << 20
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HUB_NAMES = ("docker.io", "index.docker.io")
_ASKED = "WWW-Authenticate"


@dataclass(slots=True)
class Reply:
    """A reply's head; body is filled where it was read at once."""

    connection: Connection
    url: str
    head: http.client.HTTPResponse
    body: bytes = field(default=b"", repr=False)

    @property
    def status(self) -> int:
        return self.head.status

    @property
    def origin(self) -> Origin:
        return self.connection.origin

    def header(self, name: str) -> str:
        """The value of a header, "" if there is none."""
        return self.head.headers.get(name, "")

    def header_lines(self, name: str) -> list[str]:
        return self.head.headers.get_all(name, [])


class RegistryHttp:
    """Requests to one registry; connections and tokens are kept. May be shared by threads.

    See registry.Registry for the arguments.
    """

    def __init__(
        self,
        host: str,
        *,
        credentials: Credentials | None,
        insecure: Collection[str],
        stop: threading.Event,
        quiet_s: float,
        first_delay_s: float,
    ) -> None:
        self.host = host
        self.stop = stop
        self._credentials = credentials
        self._insecure = frozenset(insecure)
        self._quiet_s = quiet_s
        self._first_delay_s = first_delay_s
        self._lock = threading.Lock()
        self._login_lock = threading.Lock()
        self._idle: list[Connection] = []
        self._found_origin: Origin | None = None
        self._looked_for_credentials = credentials is not None
        self._uses_basic = False
        self._tokens: dict[str, Token] = {}

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def ask(
        self,
        method: str,
        where: str,
        scope: str | None,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        limit: int | None = None,
        quiet_s: float | None = None,
    ) -> Reply:
        """A reply after logins, redirects and further tries; any status.

        where: a path at the registry, or a URL. scope: what to log in for, None for no login.
        limit: the longest body of a success, which is then read; else it is left to the caller.
        """
        failures = logins = 0
        while True:
            authorization = None
            try:
                origin = self.get_origin()
                url = join_url(f"{origin}/", where)
                sent = {"User-Agent": USER_AGENT, **(headers or {})}
                if scope is not None and parse_url(url)[0] == origin:
                    authorization = self.authorization(scope)
                    if authorization is not None:
                        sent["Authorization"] = authorization
                reply = self._follow(method, url, sent, body, limit, quiet_s)
            except ConnectionLost:
                failures += 1
                if failures == TRIES:
                    raise
                self.pause(failures, None)
                continue
            if reply.status in BUSY:
                failures += 1
                if failures < TRIES:
                    self.pause(failures, reply)
                    continue
            elif reply.status == 401 and scope is not None and reply.origin == origin:
                logins += 1
                if logins <= LOGINS and self.log_in(reply, scope, authorization):
                    continue
            return reply

    def _follow(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None,
        limit: int | None,
        quiet_s: float | None,
    ) -> Reply:
        first = parse_url(url)[0]
        for _ in range(_MOST_REDIRECTS + 1):
            origin, target = parse_url(url)
            self.check_plain(origin)
            if origin != first:
                headers = {k: v for k, v in headers.items() if k != "Authorization"}
            reply = self._exchange(origin, method, url, target, headers, body, limit, quiet_s)
            location = reply.header("Location")
            goes_on = reply.status in _REDIRECTS and location
            if not goes_on or (method not in ("GET", "HEAD") and reply.status < 307):
                return reply
            url = join_url(url, location)
        raise RegistryFailed(f"{self.host} redirects more than {_MOST_REDIRECTS} times")

    def _exchange(
        self,
        origin: Origin,
        method: str,
        url: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes | None,
        limit: int | None,
        quiet_s: float | None,
    ) -> Reply:
        connection = self.take(origin)
        try:
            connection.send(method, target, headers, body)
            reply = Reply(connection, url, connection.receive(quiet_s=quiet_s))
            encoding = reply.header("Content-Encoding").lower()
            if encoding not in ("", "identity"):
                raise RegistryFailed(
                    f"{origin.host_and_port} sent a body encoded as {encoding!r:.40}"
                )
            if reply.status not in (200, 206):
                reply.body = connection.read_some(reply.head, MAX_ERROR_BYTES)
            elif limit is not None:
                reply.body = connection.read_small(reply.head, limit)
            else:
                return reply
        except BaseException:
            connection.close()
            raise
        self.put_back(reply)
        return reply

    def take(self, origin: Origin) -> Connection:
        while True:
            with self._lock:
                found = next((c for c in self._idle if c.origin == origin), None)
                if found is None:
                    break
                self._idle.remove(found)
            if found.is_usable():
                return found
            found.close()
        verify = origin.host_and_port not in self._insecure
        return Connection(origin, verify=verify, stop=self.stop, quiet_s=self._quiet_s)

    def put_back(self, reply: Reply) -> None:
        # A reply that was not read to its end leaves bytes that no later one could be told from.
        if reply.head.isclosed() and not reply.head.will_close:
            with self._lock:
                if reply.connection not in self._idle:
                    self._idle.append(reply.connection)
        else:
            reply.connection.close()

    def get_origin(self) -> Origin:
        if self._found_origin is None:
            host = "registry-1.docker.io" if self.host in _HUB_NAMES else self.host
            origin = parse_url(f"https://{host}")[0]
            if self._may_be_plain(origin):
                origin = self._find_scheme(origin, parse_url(f"http://{host}")[0])
            self._found_origin = origin
        return self._found_origin

    def _find_scheme(self, tls: Origin, plain: Origin) -> Origin:
        """Which of both answers; once per registry and host, in one round trip if it is plain.

        Plain is asked first: a server for TLS refuses that at once, where one for HTTP may wait
        for the end of a line that a TLS greeting does not have.
        """
        lost: ConnectionLost | None = None
        try:
            reply = self._exchange(
                plain, "GET", f"{plain}/v2/", "/v2/", {}, None, MAX_ERROR_BYTES, None
            )
            if reply.status != 400 and not reply.header("Location").startswith("https:"):
                return plain
        except ConnectionLost as error:
            lost = error
        try:
            self.take(tls).close()
        except (NoTls, ConnectionLost):
            if lost is not None:
                raise lost from None
            return plain
        return tls

    def _may_be_plain(self, origin: Origin) -> bool:
        return origin.is_loopback or origin.host_and_port in self._insecure

    def check_plain(self, origin: Origin) -> None:
        """Only a registry that may be plain itself may send us to a plain host."""
        if origin.scheme == "https":
            return
        own = parse_url(f"http://{self.host}")[0]
        if not (self._may_be_plain(origin) and self._may_be_plain(own)):
            raise RegistryFailed(
                f"{self.host} sends to {origin.host_and_port} without encryption, which is"
                " not followed"
            )

    def authorization(self, scope: str) -> str | None:
        with self._lock:
            if self._uses_basic and self._credentials is not None:
                return self._credentials.basic()
            token = self._tokens.get(scope)
        if token is None or time.monotonic() > token.good_until:
            return None
        return f"Bearer {token.value}"

    def log_in(self, reply: Reply, scope: str, refused: str | None) -> bool:
        """Answer a 401; False if there is nothing (new) to answer with.

        refused: the Authorization header that was not enough.
        """
        offered = {c.scheme: c for c in reversed(parse_challenges(reply.header_lines(_ASKED)))}
        with self._login_lock:
            if self.authorization(scope) not in (None, refused):
                return True  # another thread has logged in meanwhile
            credentials = self._get_credentials()
            if bearer := offered.get("bearer"):
                token = self._fetch_token(bearer, scope, credentials)
                with self._lock:
                    self._tokens[scope] = token
                return True
            if "basic" in offered and credentials is not None and refused is None:
                with self._lock:
                    self._uses_basic = True
                return True
            return False

    def _get_credentials(self) -> Credentials | None:
        if not self._looked_for_credentials:
            self._credentials = find_credentials(self.host)
            self._looked_for_credentials = True
        return self._credentials

    def _fetch_token(self, bearer: Challenge, scope: str, credentials: Credentials | None) -> Token:
        realm = bearer.parameters.get("realm", "")
        origin = parse_url(realm)[0]
        said = bearer.parameters.get("scope", "")
        # A challenge to a HEAD asks for less than the push that follows it.
        if said and (not scope.endswith(",push") or "push" in said):
            scope = said
        asked = [("scope", one) for one in scope.split()]
        if service := bearer.parameters.get("service"):
            asked.append(("service", service))
        began = time.monotonic()
        if credentials is not None and credentials.identity_token:
            form = [
                ("grant_type", "refresh_token"),
                ("refresh_token", credentials.identity_token),
                ("client_id", "lumed"),
                ("service", service or ""),
                ("scope", scope),
            ]
            reply = self.ask(
                "POST",
                realm,
                None,
                headers={"Content-Type": "application/x-www-form-urlencoded"},
                body=urlencode(form).encode(),
                limit=_MAX_TOKEN_BYTES,
            )
        else:
            mark = "&" if urlsplit(realm).query else "?"
            reply = self.ask(
                "GET",
                f"{realm}{mark}{urlencode(asked)}",
                None,
                headers={"Authorization": credentials.basic()} if credentials else {},
                limit=_MAX_TOKEN_BYTES,
            )
        if reply.status != 200:
            raise self.refusal(reply, f"{origin.host_and_port} gives no tokens")
        return parse_token(reply.body, origin.host_and_port, began)

    def refusal(self, reply: Reply, missing: str) -> RegistryFailed:
        """The error for a reply that is no success; missing is the sentence for a 404."""
        said = _read_errors(reply.body)
        after = f": {said}" if said else ""
        status, who = reply.status, reply.origin.host_and_port
        if status == 404:
            return RegistryFailed(missing)
        if status in (401, 403) and self._credentials is not None:
            name = self._credentials.username or "its token"
            return RegistryFailed(
                f"{who} refused the login of {name!r:.80}{after}",
                hint="check the user name and password, and what they may do",
            )
        if status in (401, 403):
            return RegistryFailed(
                f"{who} needs a login for this, or has no such image{after}",
                hint=f"give username and password, or log in with: docker login {self.host}",
            )
        if status == 429:
            return RegistryFailed(f"{who} was asked too often{after}", hint="try again later")
        return RegistryFailed(f"{who} answered {status}{after}")

    def pause(self, failures: int, reply: Reply | None) -> None:
        """Wait before the next try. Raises Stopped, RegistryFailed if it would be too long."""
        wait_s = self._first_delay_s * 2 ** (failures - 1) * random.uniform(0.75, 1.25)  # noqa: S311
        told_s = _read_retry_after(reply.header("Retry-After")) if reply else None
        if told_s is not None and told_s > _LONGEST_RETRY_AFTER_S:
            raise RegistryFailed(
                f"{self.host} takes no requests for the next {told_s:.0f} s", hint="try again then"
            )
        if self.stop.wait(max(wait_s, told_s or 0)):
            raise Stopped


def _read_errors(body: bytes) -> str:
    """What a registry says in the body of a refusal, on one line; "" if it is of another shape."""
    try:
        errors = json.loads(body)["errors"]
        said = [f"{error['code']}: {error.get('message') or 'no message'}" for error in errors[:3]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""
    text = " ".join("; ".join(said).split())
    return "".join(c for c in text if c.isprintable())[:300]


def _read_retry_after(value: str) -> float | None:
    """Seconds from now (RFC 9110, 10.2.3); None if it says nothing."""
    if re.fullmatch(r"\d{1,9}", value):
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
