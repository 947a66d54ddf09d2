"""HTTP/1.1 connections to registries, every wait of which has an end and can be ended.

http.client on a socket of our own: 256 MB from loopback, read into one buffer, cost 0.23 s of
CPU, as with urllib3, against 0.53 s with httpx2's iter_raw, which hands out bytes objects. The
socket does not block: one that timed out cannot be read again, and a thread that waits in
recv(2) hears of no stop.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import ipaddress
import os
import select
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import unquote, urljoin, urlsplit

from lumed.errors import RegistryFailed
from lumed.images.oci import ConnectionLost
from lumed.threads import Stopped

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_PORTS = {"http": 80, "https": 443}
_CONNECT_S = 10.0
_LOOK_FOR_STOP_S = 0.25
# Request, reply's headers and small bodies together, against a server that sends a byte a minute.
_SMALL_REPLY_S = 120.0
_LONGEST_PROXY_REPLY = 64 << 10


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a connection goes, and who may see an Authorization header. host has no brackets."""

    scheme: str
    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether it is this very host, where nobody listens in."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def host_and_port(self) -> str:
        """As in a Host header: without the scheme's own port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host_and_port}"


def parse_url(url: str) -> tuple[Origin, str]:
    """The origin and the target (path and query) of an absolute http(s) URL.

    A user name in it is dropped. Raises RegistryFailed without the query, which may hold a
    signature.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
        parts = urlsplit("")
    if parts.scheme not in _PORTS or not host:
        raise RegistryFailed(f"The registry names {url.partition('?')[0]!r:.120}, which is no URL")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Origin(parts.scheme, host, port or _PORTS[parts.scheme]), target


def join_url(base: str, url: str) -> str:
    """A URL that a server gave, made absolute. Raises RegistryFailed."""
    try:
        return urljoin(base, url)
    except ValueError:
        raise RegistryFailed(
            f"The registry names {url.partition('?')[0]!r:.120}, which is no URL"
        ) from None


class NoTls(RegistryFailed):
    """The other side does not speak TLS, or not a version of it that is safe."""


class Connection:
    """One connection, one request at a time. Not to be shared by threads."""

    def __init__(
        self, origin: Origin, *, verify: bool = True, stop: threading.Event, quiet_s: float
    ) -> None:
        """Connect, through the proxy of the environment if there is one for this host.

        Raises ConnectionLost if that fails, NoTls, RegistryFailed for a certificate that is not
        to be trusted, Stopped.
        """
        self.origin = origin
        self._proxy = None if origin.is_loopback else find_proxy(origin)
        to = self._proxy.origin if self._proxy else origin
        self._wire = _Wire(_connect(to, stop), f"{to.host_and_port}", stop, quiet_s)
        try:
            if origin.scheme == "https":
                if self._proxy:
                    self._open_tunnel(self._proxy)
                self._wire.start_tls(_tls(verify, *_certificate_places()), origin.host)
        except BaseException:
            self._wire.shut()
            raise
        self._http = http.client.HTTPConnection(origin.host, origin.port)
        self._http.auto_open = 0
        self._http.sock = self._wire  # all that is used of a socket

    def is_usable(self) -> bool:
        """Whether an idle connection still stands, as far as can be seen from here."""
        return self._wire.is_quiet()

    def close(self) -> None:
        """Close it, in the middle of whatever it does."""
        self._wire.shut()

    def send(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes | None = None,
        *,
        length: int | None = None,
    ) -> None:
        """Send a request; with length, send_more() gives its body.

        Raises ConnectionLost, Stopped, RegistryFailed for a header that cannot be sent.
        """
        self._wire.give_up_at = time.monotonic() + _SMALL_REPLY_S
        if self._proxy and self.origin.scheme == "http":
            target = f"{self.origin}{target}"
            headers = {**headers, **self._proxy.headers}
        try:
            self._http.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
            self._http.putheader("Host", self.origin.host_and_port)
            # A stored length and digest are of the bytes as they are sent.
            self._http.putheader("Accept-Encoding", "identity")
            for name, value in headers.items():
                self._http.putheader(name, value)
            if body is not None or length is not None:
                self._http.putheader("Content-Length", str(length if body is None else len(body)))
            self._http.endheaders(body)
        except (http.client.HTTPException, ValueError):
            # Without the cause, which quotes the header or the URL.
            raise RegistryFailed(
                f"A request to {self.origin.host_and_port} cannot be sent: it is malformed"
            ) from None
        if length is not None:
            self._wire.give_up_at = None

    def send_more(self, data: memoryview) -> None:
        """A part of the body. Raises ConnectionLost, Stopped."""
        self._wire.sendall(data)

    def receive(self, *, quiet_s: float | None = None) -> http.client.HTTPResponse:
        """The reply's head. quiet_s: how long it may take, if longer than elsewhere.

        Raises ConnectionLost, Stopped.
        """
        self._wire.give_up_at = time.monotonic() + max(_SMALL_REPLY_S, quiet_s or 0)
        usual, self._wire.quiet_s = self._wire.quiet_s, quiet_s or self._wire.quiet_s
        try:
            return self._http.getresponse()
        except (http.client.HTTPException, OSError, ValueError) as error:
            raise self.lost("sent no proper reply") from error
        finally:
            self._wire.quiet_s = usual

    def read_into(self, reply: http.client.HTTPResponse, buffer: memoryview) -> int:
        """The next bytes of a long body, 0 at its end or if the connection broke.

        Bytes that came before a break are handed out, so that none has to be fetched twice.
        """
        self._wire.give_up_at = None
        try:
            return reply.readinto(buffer)
        except (http.client.HTTPException, ValueError):
            return 0

    def read_small(self, reply: http.client.HTTPResponse, limit: int) -> bytes:
        """A whole body of at most limit bytes. Raises ConnectionLost, RegistryFailed, Stopped."""
        try:
            body = reply.read(limit + 1)
        except (http.client.HTTPException, ValueError) as error:
            raise self.lost("broke off a reply") from error
        if len(body) > limit:
            raise RegistryFailed(f"{self.origin.host_and_port} sent more than {limit} bytes")
        if reply.length:
            raise self.lost("broke off a reply")
        return body

    def read_some(self, reply: http.client.HTTPResponse, limit: int) -> bytes:
        """The first bytes of a refusal's body, as far as they come. Raises Stopped."""
        with contextlib.suppress(http.client.HTTPException, ValueError):
            return reply.read(limit)
        return b""

    def lost(self, what: str) -> ConnectionLost:
        """The error for a broken connection, with what the system said of it."""
        return ConnectionLost(
            f"{self.origin.host_and_port} {what}: {self._wire.failure or 'it hung up'}"
        )

    def _open_tunnel(self, proxy: Proxy) -> None:
        origin = self.origin
        where = f"{f'[{origin.host}]' if ':' in origin.host else origin.host}:{origin.port}"
        head = {"Host": where, **proxy.headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
        self._wire.give_up_at = time.monotonic() + _SMALL_REPLY_S
        self._wire.sendall(f"CONNECT {where} HTTP/1.1\r\n{lines}\r\n".encode("latin-1"))
        # Byte by byte: what follows the empty line belongs to TLS.
        reply, byte = bytearray(), bytearray(1)
        while not reply.endswith(b"\r\n\r\n"):
            if not self._wire.recv_into(byte) or len(reply) > _LONGEST_PROXY_REPLY:
                raise self.lost(f"cannot be reached through the proxy {proxy.origin}")
            reply += byte
        status = reply.split(b" ", 2)[1:2]
        if status != [b"200"]:
            said = reply.partition(b"\r\n")[0].decode("latin-1")
            raise RegistryFailed(
                f"The proxy {proxy.origin} does not connect to {where}: {said!r:.120}"
            )


class _Wire:
    """A socket that does not block, in the shape that http.client wants one."""

    def __init__(self, sock: socket.socket, peer: str, stop: threading.Event, quiet_s: float):
        self._sock = sock
        self._peer = peer
        self._stop = stop
        self.quiet_s = quiet_s
        self.give_up_at: float | None = None
        self.failure: str | None = None

    def start_tls(self, context: ssl.SSLContext, host: str) -> None:
        self._sock = context.wrap_socket(
            self._sock, server_hostname=host, do_handshake_on_connect=False
        )
        give_up_at = time.monotonic() + _CONNECT_S
        while True:
            try:
                self._sock.do_handshake()
                return
            except ssl.SSLWantReadError:
                events = select.POLLIN
            except ssl.SSLWantWriteError:
                events = select.POLLOUT
            except ssl.SSLCertVerificationError as error:
                raise _distrusted(host, error.verify_message) from None
            except ssl.SSLError as error:
                raise NoTls(f"{self._peer} does not speak TLS: {error.reason or error}") from None
            except OSError as error:
                raise NoTls(f"{self._peer} hung up on TLS: {error.strerror or error}") from None
            if not _wait(self._sock, events, give_up_at, self._stop):
                raise ConnectionLost(f"{self._peer} did not answer TLS within {_CONNECT_S:g} s")

    def recv_into(self, buffer: WriteableBuffer) -> int:
        """As socket.recv_into; 0 with a `failure` if the connection broke. Raises Stopped."""
        while True:
            try:
                return self._sock.recv_into(buffer)
            except (BlockingIOError, ssl.SSLWantReadError):
                events = select.POLLIN
            except ssl.SSLWantWriteError:
                events = select.POLLOUT
            except OSError as error:
                self.failure = error.strerror or str(error)
                return 0
            if not self._wait(events):
                self.failure = f"nothing came for {self.quiet_s:g} s"
                return 0

    def sendall(self, data: ReadableBuffer) -> None:
        """See socket.sendall. Raises ConnectionLost, Stopped."""
        with memoryview(data) as view:
            at = 0
            while at < len(view):
                try:
                    at += self._sock.send(view[at:])
                    continue
                except (BlockingIOError, ssl.SSLWantWriteError):
                    events = select.POLLOUT
                except ssl.SSLWantReadError:
                    events = select.POLLIN
                except OSError as error:
                    self.failure = error.strerror or str(error)
                    raise ConnectionLost(f"{self._peer} hung up: {self.failure}") from None
                if not self._wait(events):
                    raise ConnectionLost(f"{self._peer} took nothing for {self.quiet_s:g} s")

    def _wait(self, events: int) -> bool:
        give_up_at = time.monotonic() + self.quiet_s
        if self.give_up_at is not None:
            give_up_at = min(give_up_at, self.give_up_at)
        return _wait(self._sock, events, give_up_at, self._stop)

    def is_quiet(self) -> bool:
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        return not poller.poll(0)

    def makefile(self, mode: str) -> io.BufferedReader:
        """See socket.makefile; http.client reads replies through it."""
        return io.BufferedReader(_Reader(self), 64 << 10)

    def close(self) -> None:
        """Nothing: http.client closes a socket whose last reply is still to be read."""

    def shut(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.close()


class _Reader(io.RawIOBase):
    def __init__(self, wire: _Wire) -> None:
        super().__init__()
        self._wire = wire

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        return self._wire.recv_into(buffer)


def _wait(sock: socket.socket, events: int, give_up_at: float, stop: threading.Event) -> bool:
    """Wait for a socket; False if give_up_at (time.monotonic) passed. Raises Stopped."""
    poller = select.poll()
    poller.register(sock, events)
    while True:
        if stop.is_set():
            raise Stopped
        left_s = give_up_at - time.monotonic()
        if poller.poll(max(0, min(left_s, _LOOK_FOR_STOP_S)) * 1000):
            return True
        if left_s <= 0:
            return False


def _connect(to: Origin, stop: threading.Event) -> socket.socket:
    try:
        found = socket.getaddrinfo(to.host, to.port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            raise ConnectionLost(f"The name {to.host} cannot be looked up at the moment") from None
        raise RegistryFailed(
            f"There is no host {to.host}: {error.strerror}", hint="is it spelled right?"
        ) from None
    except (OSError, UnicodeError) as error:
        raise RegistryFailed(f"The name {to.host!r:.80} cannot be looked up: {error}") from None
    reason = "no address"
    for family, kind, protocol, _, address in found:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(BlockingIOError):
                sock.connect(address)
            if not _wait(sock, select.POLLOUT, time.monotonic() + _CONNECT_S, stop):
                raise TimeoutError(0, f"no answer within {_CONNECT_S:g} s")
            if code := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(code, os.strerror(code))
        except OSError as error:
            sock.close()
            reason = error.strerror or str(error)
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise ConnectionLost(f"{to.host_and_port} cannot be reached: {reason}")


def _certificate_places() -> tuple[str, str]:
    return os.environ.get("SSL_CERT_FILE", ""), os.environ.get("SSL_CERT_DIR", "")


@cache
def _tls(verify: bool, cert_file: str, cert_dir: str) -> ssl.SSLContext:
    """The context for TLS; with the system's certificates it takes 20 ms to make, so it is kept.

    OpenSSL reads SSL_CERT_FILE and SSL_CERT_DIR itself, and says nothing of a missing file.
    """
    for name, path in (("SSL_CERT_FILE", cert_file), ("SSL_CERT_DIR", cert_dir)):
        if path and not os.access(path, os.R_OK):
            raise RegistryFailed(f"{name} names {path}, which cannot be read")
    context = ssl.create_default_context()
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _distrusted(host: str, reason: str) -> RegistryFailed:
    return RegistryFailed(
        f"The certificate of {host} is not trusted: {reason}",
        hint="name the file of its authority in SSL_CERT_FILE of the server's environment",
    )


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy of the environment; headers hold its login."""

    origin: Origin
    headers: Mapping[str, str]

    def __repr__(self) -> str:
        return f"Proxy({self.origin})"


def find_proxy(origin: Origin) -> Proxy | None:
    """The proxy for an origin by http_proxy, https_proxy, all_proxy and no_proxy.

    Raises RegistryFailed for one that is not spoken to by HTTP.
    """
    proxies = urllib.request.getproxies_environment()
    url = proxies.get(origin.scheme) or proxies.get("all")
    if not url or urllib.request.proxy_bypass(f"{origin.host}:{origin.port}", proxies):
        return None
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme != "http" or not parts.hostname:
        raise RegistryFailed(
            f"The proxy for {origin.scheme} has the scheme {parts.scheme!r:.20}; only http is"
            " possible",
            hint=f"set {origin.scheme}_proxy to http://HOST:PORT, or no_proxy",
        )
    headers = {}
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(login).decode()}"
    return Proxy(Origin("http", parts.hostname, parts.port or 80), headers)
