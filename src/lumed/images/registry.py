"""A registry of images: manifests and blobs, down and up. Blocks; made for worker threads.

OCI distribution specification 1.1; the distribution project's token authentication.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import BinaryIO
from urllib.parse import urlencode, urljoin, urlsplit

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
from lumed.images.connection import Connection, NoTls, Origin, parse_url
from lumed.images.copy import Stopped
from lumed.images.oci import (
    MANIFEST_TYPES,
    MAX_MANIFEST_BYTES,
    ConnectionLost,
    Descriptor,
    Manifest,
    Platform,
    digest_of,
    parse_manifest,
)
from lumed.images.reference import ImageReference

MAX_SMALL_BLOB_BYTES = 8 << 20
_TRIES = 5
_MOST_REDIRECTS = 5
_LOGINS = 2  # for one request: a token may run out between its issue and its use
_LONGEST_RETRY_AFTER_S = 60.0
_MAX_ERROR_BYTES = 64 << 10
_MAX_TOKEN_BYTES = 1 << 20
# A registry with a slow store is silent while it checks and moves a large blob.
_COMMIT_S = 300.0
_UPLOAD_STEP_BYTES = 1 << 20
_HUB_NAMES = ("docker.io", "index.docker.io")
_ASKED = "WWW-Authenticate"
_BUSY = frozenset({408, 429, 500, 502, 503, 504})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_USER_AGENT = f"lumed/{__version__}"


class NoSuchPlatform(RegistryFailed):
    """An index has no image for the architectures asked for; `architectures` are those it has."""

    def __init__(self, message: str, architectures: tuple[str, ...], hint: str) -> None:
        super().__init__(message, hint=hint, fields={"architectures": list(architectures)})
        self.architectures = architectures


class Registry:
    """One registry, by its host ("ghcr.io", "localhost:5000"). May be shared by threads.

    Without credentials, those of the environment and of docker's files are used once the
    registry asks for some. Plain HTTP is spoken only to hosts of loopback addresses and to those
    in `insecure` ("host:port"), whose certificates are not checked either. Every method raises
    RegistryFailed, as its subclass ConnectionLost if another try may help, and copy.Stopped
    within a second once `stop` is set. A server that is silent for quiet_s has hung up.
    """

    def __init__(
        self,
        host: str,
        *,
        credentials: Credentials | None = None,
        insecure: Collection[str] = (),
        stop: threading.Event | None = None,
        quiet_s: float = 30.0,
        first_delay_s: float = 0.25,
    ) -> None:
        self.host = host
        self._credentials = credentials
        self._insecure = frozenset(insecure)
        self._stop = stop or threading.Event()
        self._quiet_s = quiet_s
        self._first_delay_s = first_delay_s
        self._lock = threading.Lock()
        self._login_lock = threading.Lock()
        self._idle: list[Connection] = []
        self._found_origin: Origin | None = None
        self._looked_for_credentials = credentials is not None
        self._uses_basic = False
        self._tokens: dict[str, Token] = {}

    def __enter__(self) -> Registry:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def get_manifest(self, reference: ImageReference, architectures: Sequence[str]) -> Manifest:
        """The manifest of an image; of an index, the one for the first architecture it has.

        architectures in OCI's words, by preference: ("amd64", "arm64"). A manifest without an
        index is returned whatever its architecture. Raises NoSuchPlatform.
        """
        found = self._get_manifest(reference, reference.version)
        if isinstance(found, Manifest):
            return found
        wanted = _choose_platform(found, architectures)
        if wanted is None:
            there = tuple(dict.fromkeys(p.architecture or "unknown" for p in found))
            raise NoSuchPlatform(
                f"{reference} is not made for {' or '.join(architectures)}",
                there,
                hint=f"it is made for: {', '.join(there) or 'nothing'}",
            )
        manifest = self._get_manifest(reference, wanted.manifest.digest)
        if not isinstance(manifest, Manifest):
            raise RegistryFailed(f"{reference} is an index of indexes, which is not understood")
        return manifest

    def get_blob(self, repository: str, blob: Descriptor) -> bytes:
        """A small blob, of at most 8 MiB, its digest checked."""
        if blob.size_bytes > MAX_SMALL_BLOB_BYTES:
            raise RegistryFailed(
                f"{self.host} names a blob of {blob.size_bytes} bytes where at most"
                f" {MAX_SMALL_BLOB_BYTES} are taken: {blob.digest}"
            )
        reply = self._ask(
            "GET",
            _blob_path(repository, blob.digest),
            _pull_scope(repository),
            limit=MAX_SMALL_BLOB_BYTES,
        )
        if reply.status != 200:
            raise self._refusal(reply, f"{self.host} has no blob {blob.digest} of {repository}")
        if digest_of(reply.body) != blob.digest:
            raise RegistryFailed(f"{self.host} sent other bytes than those of {blob.digest}")
        return reply.body

    @contextlib.contextmanager
    def open_blob(self, repository: str, blob: Descriptor, offset: int = 0) -> Iterator[BlobStream]:
        """A blob from an offset below its size, unchecked; the stream says where it begins."""
        if not 0 <= offset < max(1, blob.size_bytes):
            raise ValueError(f"offset {offset} in a blob of {blob.size_bytes} bytes")
        reply = self._ask(
            "GET",
            _blob_path(repository, blob.digest),
            _pull_scope(repository),
            headers={"Range": f"bytes={offset}-"} if offset else {},
        )
        if reply.status not in (200, 206):
            raise self._refusal(reply, f"{self.host} has no blob {blob.digest} of {repository}")
        try:
            yield BlobStream(reply, blob, offset, self._stop)
        finally:
            self._put_back(reply)

    def has_blob(self, repository: str, digest: str) -> bool:
        """Whether a push to this repository can leave the blob out."""
        reply = self._ask("HEAD", _blob_path(repository, digest), _push_scope(repository), limit=0)
        if reply.status in (200, 404):
            return reply.status == 200
        raise self._refusal(reply, f"{self.host} did not say whether it has {digest}")

    def upload_blob(
        self, repository: str, path: Path, digest: str, *, report: Callable[[int], None]
    ) -> None:
        """Send a file as the blob of that digest; the registry checks it.

        report gets the count of bytes sent from the file's start; it falls back after a break
        to what the registry has kept. Raises OSError for the file.
        """
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            session, sent = self._start_upload(repository), 0
            if size:
                session = self._send_file(session, repository, file, sent, size, report)
            self._finish_upload(session, repository, digest)

    def put_manifest(self, reference: ImageReference, media_type: str, raw: bytes) -> str:
        """Store a manifest under the reference's tag (or digest); returns its digest."""
        digest = digest_of(raw)
        reply = self._ask(
            "PUT",
            f"/v2/{reference.repository}/manifests/{reference.version}",
            _push_scope(reference.repository),
            headers={"Content-Type": media_type},
            body=raw,
            limit=_MAX_ERROR_BYTES,
            quiet_s=_COMMIT_S,
        )
        if reply.status not in (200, 201, 202):
            raise self._refusal(reply, f"{self.host} has no place for {reference}")
        said = reply.header("Docker-Content-Digest")
        if said.startswith("sha256:") and said != digest:
            raise RegistryFailed(f"{self.host} stored other bytes than those of {digest}")
        return digest

    def _start_upload(self, repository: str) -> str:
        reply = self._ask(
            "POST",
            f"/v2/{repository}/blobs/uploads/",
            _push_scope(repository),
            body=b"",
            limit=_MAX_ERROR_BYTES,
        )
        if reply.status != 202 or not reply.header("Location"):
            raise self._refusal(reply, f"{self.host} has no place for {repository}")
        return urljoin(reply.url, reply.header("Location"))

    def _send_file(
        self,
        session: str,
        repository: str,
        file: BinaryIO,
        sent: int,
        size: int,
        report: Callable[[int], None],
    ) -> str:
        """Send it within an upload session, going on where it breaks; where the session is now."""
        scope, failures, logins, most = _push_scope(repository), 0, 0, sent
        while True:
            reply: _Reply | None = None
            authorization = self._authorization(scope)
            try:
                reply = self._send_rest(session, authorization, file, sent, size, report)
            except ConnectionLost as error:
                cause: RegistryFailed = error
            else:
                if reply.status in (201, 202, 204):
                    return urljoin(reply.url, reply.header("Location") or session)
                if reply.status == 401:
                    # It took nothing, so the session stands where it stood.
                    logins += 1
                    if logins <= _LOGINS and self._log_in(reply, scope, authorization):
                        continue
                cause = self._refusal(reply, f"{self.host} has lost the upload")
                if reply.status not in (*_BUSY, 404, 416):
                    raise cause
            failures += 1
            if failures == _TRIES:
                raise cause
            self._pause(failures, reply)
            found = self._find_upload(session, scope)
            session, sent = found or (self._start_upload(repository), 0)
            if sent > size:
                session, sent = self._start_upload(repository), 0
            if sent > most:
                most, failures, logins = sent, 0, 0
            report(sent)

    def _send_rest(
        self,
        session: str,
        authorization: str | None,
        file: BinaryIO,
        sent: int,
        size: int,
        report: Callable[[int], None],
    ) -> _Reply:
        origin, target = parse_url(session)
        self._check_plain(origin)
        headers = {"User-Agent": _USER_AGENT, "Content-Type": "application/octet-stream"}
        if sent:
            headers["Content-Range"] = f"{sent}-{size - 1}"
        if authorization and origin == self._get_origin():
            headers["Authorization"] = authorization
        connection, is_whole = self._take(origin), False
        try:
            # The registry may refuse early and hang up: what it said then counts.
            with contextlib.suppress(ConnectionLost):
                connection.send("PATCH", target, headers, length=size - sent)
                file.seek(sent)
                buffer = memoryview(bytearray(_UPLOAD_STEP_BYTES))
                while sent < size:
                    step = buffer[: min(len(buffer), size - sent)]
                    count = file.readinto(step)  # type: ignore[attr-defined]
                    if not count:
                        raise RegistryFailed("The file became shorter while it was sent")
                    connection.send_more(step[:count])
                    sent += count
                    report(sent)
                is_whole = True
            reply = _Reply(connection, session, connection.receive(quiet_s=_COMMIT_S))
            reply.body = connection.read_some(reply.head, _MAX_ERROR_BYTES)
        except BaseException:
            connection.close()
            raise
        if is_whole:
            self._put_back(reply)
        else:
            connection.close()
        return reply

    def _find_upload(self, session: str, scope: str) -> tuple[str, int] | None:
        """Where an upload session is and how many bytes it has; None if it is gone."""
        reply = self._ask("GET", session, scope, limit=_MAX_ERROR_BYTES)
        match = re.fullmatch(r"(?:bytes=)?0-(\d{1,18})", reply.header("Range"))
        if reply.status not in (200, 202, 204) or match is None:
            return None
        # "0-0" is said of an empty upload, too.
        last = int(match[1])
        return urljoin(reply.url, reply.header("Location") or session), last + 1 if last else 0

    def _finish_upload(self, session: str, repository: str, digest: str) -> None:
        mark = "&" if urlsplit(session).query else "?"
        reply = self._ask(
            "PUT",
            f"{session}{mark}{urlencode({'digest': digest})}",
            _push_scope(repository),
            body=b"",
            limit=_MAX_ERROR_BYTES,
            quiet_s=_COMMIT_S,
        )
        # Its answer may have been lost, and the session with it: then the blob is there.
        if reply.status not in (200, 201, 204) and not self.has_blob(repository, digest):
            raise self._refusal(reply, f"{self.host} has lost the upload of {digest}")

    def _get_manifest(
        self, reference: ImageReference, version: str
    ) -> Manifest | tuple[Platform, ...]:
        reply = self._ask(
            "GET",
            f"/v2/{reference.repository}/manifests/{version}",
            _pull_scope(reference.repository),
            headers={"Accept": ", ".join(MANIFEST_TYPES)},
            limit=MAX_MANIFEST_BYTES,
        )
        if reply.status != 200:
            raise self._refusal(reply, f"Image not found: {reference}")
        digest = digest_of(reply.body)
        said = reply.header("Docker-Content-Digest")
        if (version.startswith("sha256:") and version != digest) or (
            said.startswith("sha256:") and said != digest
        ):
            raise RegistryFailed(f"{self.host} sent a manifest of {reference} with wrong bytes")
        return parse_manifest(reply.body)

    def _ask(
        self,
        method: str,
        where: str,
        scope: str | None,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        limit: int | None = None,
        quiet_s: float | None = None,
    ) -> _Reply:
        """A reply after logins, redirects and further tries; any status.

        where: a path at the registry, or a URL. scope: what to log in for, None for no login.
        limit: the longest body of a success, which is then read; else it is left to the caller.
        """
        failures = logins = 0
        while True:
            authorization = None
            try:
                origin = self._get_origin()
                url = urljoin(f"{origin}/", where)
                sent = {"User-Agent": _USER_AGENT, **(headers or {})}
                if scope is not None and parse_url(url)[0] == origin:
                    authorization = self._authorization(scope)
                    if authorization is not None:
                        sent["Authorization"] = authorization
                reply = self._follow(method, url, sent, body, limit, quiet_s)
            except ConnectionLost:
                failures += 1
                if failures == _TRIES:
                    raise
                self._pause(failures, None)
                continue
            if reply.status in _BUSY:
                failures += 1
                if failures < _TRIES:
                    self._pause(failures, reply)
                    continue
            elif reply.status == 401 and scope is not None and reply.origin == origin:
                logins += 1
                if logins <= _LOGINS and self._log_in(reply, scope, authorization):
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
    ) -> _Reply:
        first = parse_url(url)[0]
        for _ in range(_MOST_REDIRECTS + 1):
            origin, target = parse_url(url)
            self._check_plain(origin)
            if origin != first:
                headers = {k: v for k, v in headers.items() if k != "Authorization"}
            reply = self._exchange(origin, method, url, target, headers, body, limit, quiet_s)
            location = reply.header("Location")
            goes_on = reply.status in _REDIRECTS and location
            if not goes_on or (method not in ("GET", "HEAD") and reply.status < 307):
                return reply
            url = urljoin(url, location)
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
    ) -> _Reply:
        connection = self._take(origin)
        try:
            connection.send(method, target, headers, body)
            reply = _Reply(connection, url, connection.receive(quiet_s=quiet_s))
            encoding = reply.header("Content-Encoding").lower()
            if encoding not in ("", "identity"):
                raise RegistryFailed(
                    f"{origin.host_and_port} sent a body encoded as {encoding!r:.40}"
                )
            if reply.status not in (200, 206):
                reply.body = connection.read_some(reply.head, _MAX_ERROR_BYTES)
            elif limit is not None:
                reply.body = connection.read_small(reply.head, limit)
            else:
                return reply
        except BaseException:
            connection.close()
            raise
        self._put_back(reply)
        return reply

    def _take(self, origin: Origin) -> Connection:
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
        return Connection(origin, verify=verify, stop=self._stop, quiet_s=self._quiet_s)

    def _put_back(self, reply: _Reply) -> None:
        # A reply that was not read to its end leaves bytes that no later one could be told from.
        if reply.head.isclosed() and not reply.head.will_close:
            with self._lock:
                if reply.connection not in self._idle:
                    self._idle.append(reply.connection)
        else:
            reply.connection.close()

    def _get_origin(self) -> Origin:
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
                plain, "GET", f"{plain}/v2/", "/v2/", {}, None, _MAX_ERROR_BYTES, None
            )
            if reply.status != 400 and not reply.header("Location").startswith("https:"):
                return plain
        except ConnectionLost as error:
            lost = error
        try:
            self._take(tls).close()
        except (NoTls, ConnectionLost):
            if lost is not None:
                raise lost from None
            return plain
        return tls

    def _may_be_plain(self, origin: Origin) -> bool:
        return origin.is_loopback or origin.host_and_port in self._insecure

    def _check_plain(self, origin: Origin) -> None:
        """Only a registry that may be plain itself may send us to a plain host."""
        if origin.scheme == "https":
            return
        own = parse_url(f"http://{self.host}")[0]
        if not (self._may_be_plain(origin) and self._may_be_plain(own)):
            raise RegistryFailed(
                f"{self.host} sends to {origin.host_and_port} without encryption, which is"
                " not followed"
            )

    def _authorization(self, scope: str) -> str | None:
        with self._lock:
            if self._uses_basic and self._credentials is not None:
                return self._credentials.basic()
            token = self._tokens.get(scope)
        if token is None or time.monotonic() > token.good_until:
            return None
        return f"Bearer {token.value}"

    def _log_in(self, reply: _Reply, scope: str, refused: str | None) -> bool:
        """Answer a 401; False if there is nothing (new) to answer with.

        refused: the Authorization header that was not enough.
        """
        offered = {c.scheme: c for c in reversed(parse_challenges(reply.header_lines(_ASKED)))}
        with self._login_lock:
            if self._authorization(scope) not in (None, refused):
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
            reply = self._ask(
                "POST",
                realm,
                None,
                headers={"Content-Type": "application/x-www-form-urlencoded"},
                body=urlencode(form).encode(),
                limit=_MAX_TOKEN_BYTES,
            )
        else:
            mark = "&" if urlsplit(realm).query else "?"
            reply = self._ask(
                "GET",
                f"{realm}{mark}{urlencode(asked)}",
                None,
                headers={"Authorization": credentials.basic()} if credentials else {},
                limit=_MAX_TOKEN_BYTES,
            )
        if reply.status != 200:
            raise self._refusal(reply, f"{origin.host_and_port} gives no tokens")
        return parse_token(reply.body, origin.host_and_port, began)

    def _refusal(self, reply: _Reply, missing: str) -> RegistryFailed:
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

    def _pause(self, failures: int, reply: _Reply | None) -> None:
        """Wait before the next try. Raises Stopped, RegistryFailed if it would be too long."""
        wait_s = self._first_delay_s * 2 ** (failures - 1) * random.uniform(0.75, 1.25)  # noqa: S311
        told_s = _read_retry_after(reply.header("Retry-After")) if reply else None
        if told_s is not None and told_s > _LONGEST_RETRY_AFTER_S:
            raise RegistryFailed(
                f"{self.host} takes no requests for the next {told_s:.0f} s", hint="try again then"
            )
        if self._stop.wait(max(wait_s, told_s or 0)):
            raise Stopped


class BlobStream:
    """The bytes of a blob as they come. offset: where they begin, 0 if Range was ignored."""

    def __init__(self, reply: _Reply, blob: Descriptor, asked: int, stop: threading.Event) -> None:
        who = reply.origin.host_and_port
        self.offset = 0
        if reply.status == 206:
            match = re.fullmatch(
                r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", reply.header("Content-Range")
            )
            if (
                match is None
                or int(match[1]) != asked
                or match[2] not in ("*", str(blob.size_bytes))
            ):
                raise RegistryFailed(f"{who} sent another part of {blob.digest} than asked for")
            self.offset = asked
        left = blob.size_bytes - self.offset
        if reply.head.length is not None and reply.head.length != left:
            raise RegistryFailed(
                f"{who} has {reply.head.length} bytes of {blob.digest} where the manifest says"
                f" {left}"
            )
        self._reply = reply
        self._blob = blob
        self._left = left
        self._stop = stop

    def readinto(self, buffer: memoryview) -> int:
        """Fill the buffer, or less at the end or before a break; 0 at the end.

        Never more than the blob's size. Raises ConnectionLost if it broke off before, Stopped.
        """
        if self._stop.is_set():
            raise Stopped
        if not self._left:
            return 0
        count = self._reply.connection.read_into(self._reply.head, buffer[: self._left])
        if not count and len(buffer):
            raise self._reply.connection.lost(
                f"broke off {self._blob.digest} with {self._left} of"
                f" {self._blob.size_bytes} bytes left"
            )
        self._left -= count
        return count


@dataclass(slots=True)
class _Reply:
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


def _blob_path(repository: str, digest: str) -> str:
    return f"/v2/{repository}/blobs/{digest}"


def _pull_scope(repository: str) -> str:
    return f"repository:{repository}:pull"


def _push_scope(repository: str) -> str:
    return f"repository:{repository}:pull,push"


def _choose_platform(there: Sequence[Platform], architectures: Sequence[str]) -> Platform | None:
    for architecture in architectures:
        fitting = [p for p in there if p.architecture == architecture]
        if fitting:
            return next((p for p in fitting if p.os == "linux"), fitting[0])
    return None


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
