"""A proxy before a registry that fails on demand, and tells what it was asked and what it sent.

    with FaultProxy(registry.host) as proxy:
        proxy.cut("/blobs/", after=1000)             # the first blob breaks off, once
        proxy.answer("/manifests/", 503, times=2, retry_after=0)
        proxy.ask_token(uses=3)                      # tokens by the docker protocol, short-lived
        store = FaultProxy(registry.host, "127.0.0.2"); proxy.redirect("/blobs/", store)
        ... pull from proxy.host ...
        assert proxy.served[digest] == size + 1000

Each fault is for requests whose path contains a text, and ends after `times` (0: never). The
first fault that fits is taken, in the order in which they were given; one fault a request. No
fault waits by the clock: `hold` waits for an event.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import re
import secrets
import socket
import struct
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Literal
from urllib.parse import parse_qs, urlsplit

_STEP = 64 << 10
_HELD_S = 60.0
_BLOB = re.compile(r"/blobs/(sha256:[0-9a-f]{64})")
_Kind = Literal[
    "cut", "cut upload", "swallow", "answer", "hold", "flip", "shorten", "no range", "redirect"
]


@dataclass(slots=True)
class Seen:
    """A request as it came; status is what it was answered, 0 before that or if cut off."""

    method: str
    target: str
    headers: Mapping[str, str]
    status: int = 0

    @property
    def authorization(self) -> str | None:
        """The header, if it was sent."""
        return self.headers.get("Authorization")


@dataclass(slots=True)
class _Fault:
    kind: _Kind
    path: str
    left: int  # below 0: without end
    at: int = 0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    event: threading.Event | None = None
    reset: bool = False
    keep: bool = False


class FaultProxy:
    """A context manager; `host` is "address:port". Threads of this process, no other."""

    def __init__(self, upstream: str, address: str = "127.0.0.1") -> None:
        """upstream: the registry's host:port, which must speak plain HTTP."""
        self.upstream = upstream
        self.requests: list[Seen] = []
        self.served: Counter[str] = Counter()  # bytes of each blob, by digest
        self.uploaded = 0  # bytes of bodies of PATCH and PUT that came
        self.noticed = threading.Event()  # set when a fault is taken; for "now it waits"
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()
        self._moved: dict[str, str] = {}  # uploads that were cut: where they go on
        self._tokens: dict[str, int] | None = None
        self._uses = 0
        self._login: tuple[str, str] | None = None
        self._expires_in: int | None = None
        self._server = _Server((address, 0), _Handler)
        self._server.proxy = self
        self.host = f"{address}:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.hang_up()
        self._server.server_close()
        self._thread.join(10)

    def cut(
        self, path: str = "/blobs/", *, after: int, times: int = 1, reset: bool = False
    ) -> None:
        """Hang up after that many bytes of a reply's body, which all arrive.

        reset: by a TCP reset, in which the last of them may be lost.
        """
        self._add(_Fault("cut", path, times or -1, at=after, reset=reset))

    def swallow(self, path: str, *, times: int = 1) -> None:
        """Let the registry act, and hang up instead of its answer."""
        self._add(_Fault("swallow", path, times or -1))

    def cut_upload(
        self, path: str = "/uploads/", *, after: int, times: int = 1, keep: bool = False
    ) -> None:
        """Reset both connections after that many bytes of a request's body (of PATCH, PUT).

        docker-registry then forgets the upload; keep: as a registry that keeps what has come.
        """
        self._add(_Fault("cut upload", path, times or -1, at=after, keep=keep))

    def answer(
        self,
        path: str,
        status: int,
        *,
        times: int = 1,
        retry_after: int | str | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
    ) -> None:
        """Answer by itself; the registry hears nothing."""
        sent = dict(headers or {})
        if retry_after is not None:
            sent["Retry-After"] = str(retry_after)
        self._add(_Fault("answer", path, times or -1, status=status, headers=sent, body=body))

    def hold(self, path: str, event: threading.Event, *, after: int = -1, times: int = 1) -> None:
        """Wait for the event before the reply, or after that many bytes of its body."""
        self._add(_Fault("hold", path, times or -1, at=after, event=event))

    def flip(self, path: str = "/blobs/", *, at: int, times: int = 1) -> None:
        """Turn over a bit in one byte of the body."""
        self._add(_Fault("flip", path, times or -1, at=at))

    def shorten(self, path: str = "/blobs/", *, to: int, times: int = 1) -> None:
        """Send only so much of the body, as if that were all of it (Content-Length says so)."""
        self._add(_Fault("shorten", path, times or -1, at=to))

    def ignore_range(self, path: str = "/blobs/", *, times: int = 0) -> None:
        """Answer requests for a part with the whole."""
        self._add(_Fault("no range", path, times or -1))

    def redirect(self, path: str, to: FaultProxy | str, *, times: int = 0) -> None:
        """Send requests to another proxy (or "scheme://host:port") with the same target."""
        base = to if isinstance(to, str) else f"http://{to.host}"
        self._add(_Fault("redirect", path, times or -1, headers={"Location": base}))

    def ask_token(
        self,
        *,
        uses: int = 0,
        login: tuple[str, str] | None = None,
        expires_in: int | None = None,
    ) -> None:
        """Ask for bearer tokens, given by its own /token; each good for `uses` requests (0: all).

        With a login, only who has it gets one. Requests of tokens are in `requests`, too.
        """
        self._tokens, self._uses, self._login = {}, uses, login
        self._expires_in = expires_in

    def clear(self) -> None:
        """No faults any more (tokens are still asked for); the counts begin anew."""
        with self._lock:
            self._faults.clear()
            self.requests.clear()
            self.served.clear()
            self.uploaded = 0
            self.noticed.clear()

    def count(self, method: str, path: str) -> int:
        """How many requests of a method had the text in their path."""
        with self._lock:
            return sum(seen.method == method and path in seen.target for seen in self.requests)

    def _add(self, fault: _Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def _take_fault(self, method: str, target: str, ranged: bool) -> _Fault | None:
        with self._lock:
            for fault in self._faults:
                fits = fault.path in target
                if fault.kind == "no range":
                    fits = fits and ranged
                elif fault.kind == "cut upload":
                    fits = fits and method in ("PATCH", "PUT")
                elif fault.kind in ("flip", "shorten"):
                    fits = fits and method == "GET"
                if fits and fault.left:
                    fault.left -= 1
                    self.noticed.set()
                    return fault
        return None

    def _give_token(self, target: str, authorization: str | None) -> tuple[int, dict[str, object]]:
        if self._login is not None:
            wanted = base64.b64encode(":".join(self._login).encode()).decode()
            if authorization != f"Basic {wanted}":
                return 401, {"errors": [{"code": "UNAUTHORIZED", "message": "who are you?"}]}
        token = secrets.token_hex(16)
        assert self._tokens is not None
        # Good for the scopes that were asked for, as the registry behind would check.
        scopes = " ".join(parse_qs(urlsplit(target).query).get("scope", []))
        with self._lock:
            self._tokens[f"{token} {scopes}"] = self._uses or 1 << 40
        reply: dict[str, object] = {"token": token}
        if self._expires_in is not None:
            reply["expires_in"] = self._expires_in
        return 200, reply

    def _check_token(self, method: str, target: str, authorization: str | None) -> str | None:
        """None if the request may go on, else the challenge."""
        if self._tokens is None:
            return None
        repository = re.sub(r"^/v2/|/(blobs|manifests)/.*$", "", urlsplit(target).path)
        actions = "pull" if method in ("GET", "HEAD") else "pull,push"
        token = (authorization or "").removeprefix("Bearer ")
        with self._lock:
            for key, left in self._tokens.items():
                known, _, scopes = key.partition(" ")
                covers = any(
                    scope.startswith(f"repository:{repository}:") and scope.endswith(actions[4:])
                    for scope in scopes.split()
                )
                if known == token and left > 0 and (covers or not repository):
                    self._tokens[key] -= 1
                    return None
        return (
            f'Bearer realm="http://{self.host}/token?a=b",service="the tests",'
            f'scope="repository:{repository}:{actions}"'
        )


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    proxy: FaultProxy

    def __init__(self, *arguments: object) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(*arguments)  # type: ignore[arg-type]

    def process_request(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: object
    ) -> None:
        assert isinstance(request, socket.socket)
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket | tuple[bytes, socket.socket]) -> None:
        assert isinstance(request, socket.socket)
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """End the connections whose threads wait for another request; the threads end, too."""
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what the tests are about."""


class _Cut(Exception):
    """The connection is to end here."""

    def __init__(self, *, reset: bool = False) -> None:
        super().__init__()
        self.reset = reset


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    connection: socket.socket

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def handle_one_request(self) -> None:
        """See BaseHTTPRequestHandler; every method is the same here."""
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        # Noted before the reply, so that it is there once the client has that.
        seen = Seen(self.command, self.path, dict(self.headers.items()))
        proxy = self.server.proxy
        with proxy._lock:
            proxy.requests.append(seen)
        try:
            seen.status = self._serve()
        except (_Cut, OSError, http.client.HTTPException) as error:
            self.close_connection = True
            if isinstance(error, _Cut) and error.reset:
                self.connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
                self.connection.close()

    def _serve(self) -> int:
        proxy = self.server.proxy
        authorization = self.headers.get("Authorization")
        if proxy._tokens is not None and self.path.startswith("/token"):
            status, reply = proxy._give_token(self.path, authorization)
            return self._reply(
                status, {"Content-Type": "application/json"}, json.dumps(reply).encode()
            )
        challenge = proxy._check_token(self.command, self.path, authorization)
        if challenge is not None:
            body = b'{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}'
            return self._reply(401, {"WWW-Authenticate": challenge}, body)
        fault = proxy._take_fault(self.command, self.path, "Range" in self.headers)
        if fault and fault.kind == "hold" and fault.at < 0 and fault.event:
            fault.event.wait(_HELD_S)
        if fault and fault.kind == "answer":
            return self._reply(fault.status, fault.headers, fault.body)
        if fault and fault.kind == "redirect":
            return self._reply(307, {"Location": fault.headers["Location"] + self.path}, b"")
        return self._forward(fault)

    def _reply(self, status: int, headers: Mapping[str, str], body: bytes) -> int:
        # What was sent with it is read, or the answer would be lost by a reset.
        left = int(self.headers.get("Content-Length") or 0)
        while left > 0 and (read := self.rfile.read(min(left, _STEP))):
            left -= len(read)
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        return status

    def _forward(self, fault: _Fault | None) -> int:
        proxy = self.server.proxy
        upstream = http.client.HTTPConnection(proxy.upstream, timeout=_HELD_S)
        left = int(self.headers.get("Content-Length") or 0)
        allowed = fault.at if fault and fault.kind == "cut upload" else left + 1
        headers = dict(self.headers.items())
        if fault and fault.kind == "no range":
            del headers["Range"]
        if proxy._tokens is not None:
            headers.pop("Authorization", None)
        if fault and fault.keep:
            headers["Content-Length"] = str(allowed)
            headers.pop("Content-Range", None)
        session = self.path.partition("?")[0]
        with contextlib.closing(upstream):
            target = proxy._moved.pop(session, self.path)
            upstream.putrequest(self.command, target, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                upstream.putheader(name, value)
            upstream.endheaders()
            while left and (data := self.rfile.read1(min(left, _STEP, allowed))):
                upstream.send(data)
                left -= len(data)
                allowed -= len(data)
                with proxy._lock:
                    proxy.uploaded += len(data)
                if not allowed:
                    if fault and fault.keep:
                        moved = urlsplit(upstream.getresponse().headers["Location"])
                        proxy._moved[session] = f"{moved.path}?{moved.query}"
                    raise _Cut(reset=True)
            return self._send_back(upstream.getresponse(), fault)

    def _send_back(self, reply: http.client.HTTPResponse, fault: _Fault | None) -> int:
        headers = Message()
        for name, value in reply.getheaders():
            headers[name] = value
        if fault and fault.kind == "swallow":
            raise _Cut
        length = reply.length or 0
        if fault and fault.kind == "shorten" and reply.status in (200, 206):
            length = min(length, fault.at)
            del headers["Content-Length"]
            headers["Content-Length"] = str(length)
        self.send_response_only(reply.status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers and reply.status != 204:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "HEAD":
            return reply.status
        blob = _BLOB.search(self.path) if reply.status in (200, 206) else None
        sent = 0
        while sent < length:
            step = min(length - sent, _STEP)
            breaks = fault is not None and fault.kind in ("cut", "hold") and fault.at >= 0
            if fault and breaks and sent <= fault.at:
                step = min(step, fault.at - sent) or step
                if sent == fault.at:
                    self._break(fault)
            data = bytearray(reply.read(step))
            if not data:
                raise _Cut
            if fault and fault.kind == "flip" and sent <= fault.at < sent + len(data):
                data[fault.at - sent] ^= 0x10
            if blob:
                with self.server.proxy._lock:
                    self.server.proxy.served[blob[1]] += len(data)
            self.wfile.write(data)
            sent += len(data)
        return reply.status

    def _break(self, fault: _Fault) -> None:
        if fault.kind == "hold" and fault.event:
            fault.event.wait(_HELD_S)
            return
        raise _Cut(reset=fault.reset)
