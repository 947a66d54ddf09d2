"""A registry of images: manifests and blobs, down and up. Blocks; made for worker threads.

OCI distribution specification 1.1.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO
from urllib.parse import urlencode, urlsplit

from lumed.errors import RegistryFailed
from lumed.images.auth import Credentials
from lumed.images.connection import join_url, parse_url
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
from lumed.images.registry_http import (
    BUSY,
    LOGINS,
    MAX_ERROR_BYTES,
    TRIES,
    USER_AGENT,
    RegistryHttp,
    Reply,
)
from lumed.threads import Stopped

MAX_SMALL_BLOB_BYTES = 8 << 20
# A registry with a slow store is silent while it checks and moves a large blob.
_COMMIT_S = 300.0
_UPLOAD_STEP_BYTES = 1 << 20


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
        self._http = RegistryHttp(
            host,
            credentials=credentials,
            insecure=insecure,
            stop=stop or threading.Event(),
            quiet_s=quiet_s,
            first_delay_s=first_delay_s,
        )

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
        self._http.close()

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
        reply = self._http.ask(
            "GET",
            _blob_path(repository, blob.digest),
            _pull_scope(repository),
            limit=MAX_SMALL_BLOB_BYTES,
        )
        if reply.status != 200:
            raise self._http.refusal(
                reply, f"{self.host} has no blob {blob.digest} of {repository}"
            )
        if digest_of(reply.body) != blob.digest:
            raise RegistryFailed(f"{self.host} sent other bytes than those of {blob.digest}")
        return reply.body

    @contextlib.contextmanager
    def open_blob(self, repository: str, blob: Descriptor, offset: int = 0) -> Iterator[BlobStream]:
        """A blob from an offset below its size, unchecked; the stream says where it begins."""
        if not 0 <= offset < max(1, blob.size_bytes):
            raise ValueError(f"offset {offset} in a blob of {blob.size_bytes} bytes")
        reply = self._http.ask(
            "GET",
            _blob_path(repository, blob.digest),
            _pull_scope(repository),
            headers={"Range": f"bytes={offset}-"} if offset else {},
        )
        if reply.status not in (200, 206):
            raise self._http.refusal(
                reply, f"{self.host} has no blob {blob.digest} of {repository}"
            )
        try:
            yield BlobStream(reply, blob, offset, self._http.stop)
        finally:
            self._http.put_back(reply)

    def has_blob(self, repository: str, digest: str) -> bool:
        """Whether a push to this repository can leave the blob out."""
        reply = self._http.ask(
            "HEAD", _blob_path(repository, digest), _push_scope(repository), limit=0
        )
        if reply.status in (200, 404):
            return reply.status == 200
        raise self._http.refusal(reply, f"{self.host} did not say whether it has {digest}")

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
        reply = self._http.ask(
            "PUT",
            f"/v2/{reference.repository}/manifests/{reference.version}",
            _push_scope(reference.repository),
            headers={"Content-Type": media_type},
            body=raw,
            limit=MAX_ERROR_BYTES,
            quiet_s=_COMMIT_S,
        )
        if reply.status not in (200, 201, 202):
            raise self._http.refusal(reply, f"{self.host} has no place for {reference}")
        said = reply.header("Docker-Content-Digest")
        if said.startswith("sha256:") and said != digest:
            raise RegistryFailed(f"{self.host} stored other bytes than those of {digest}")
        return digest

    def _start_upload(self, repository: str) -> str:
        reply = self._http.ask(
            "POST",
            f"/v2/{repository}/blobs/uploads/",
            _push_scope(repository),
            body=b"",
            limit=MAX_ERROR_BYTES,
        )
        if reply.status != 202 or not reply.header("Location"):
            raise self._http.refusal(reply, f"{self.host} has no place for {repository}")
        return join_url(reply.url, reply.header("Location"))

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
            reply: Reply | None = None
            authorization = self._http.authorization(scope)
            try:
                reply = self._send_rest(session, authorization, file, sent, size, report)
            except ConnectionLost as error:
                cause: RegistryFailed = error
            else:
                if reply.status in (201, 202, 204):
                    return join_url(reply.url, reply.header("Location") or session)
                if reply.status == 401:
                    # It took nothing, so the session stands where it stood.
                    logins += 1
                    if logins <= LOGINS and self._http.log_in(reply, scope, authorization):
                        continue
                cause = self._http.refusal(reply, f"{self.host} has lost the upload")
                if reply.status not in (*BUSY, 404, 416):
                    raise cause
            failures += 1
            if failures == TRIES:
                raise cause
            self._http.pause(failures, reply)
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
    ) -> Reply:
        origin, target = parse_url(session)
        self._http.check_plain(origin)
        headers = {"User-Agent": USER_AGENT, "Content-Type": "application/octet-stream"}
        if sent:
            headers["Content-Range"] = f"{sent}-{size - 1}"
        if authorization and origin == self._http.get_origin():
            headers["Authorization"] = authorization
        connection, is_whole = self._http.take(origin), False
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
            reply = Reply(connection, session, connection.receive(quiet_s=_COMMIT_S))
            reply.body = connection.read_some(reply.head, MAX_ERROR_BYTES)
        except BaseException:
            connection.close()
            raise
        if is_whole:
            self._http.put_back(reply)
        else:
            connection.close()
        return reply

    def _find_upload(self, session: str, scope: str) -> tuple[str, int] | None:
        """Where an upload session is and how many bytes it has; None if it is gone."""
        reply = self._http.ask("GET", session, scope, limit=MAX_ERROR_BYTES)
        match = re.fullmatch(r"(?:bytes=)?0-(\d{1,18})", reply.header("Range"))
        if reply.status not in (200, 202, 204) or match is None:
            return None
        # "0-0" is said of an empty upload, too.
        last = int(match[1])
        return join_url(reply.url, reply.header("Location") or session), last + 1 if last else 0

    def _finish_upload(self, session: str, repository: str, digest: str) -> None:
        mark = "&" if urlsplit(session).query else "?"
        reply = self._http.ask(
            "PUT",
            f"{session}{mark}{urlencode({'digest': digest})}",
            _push_scope(repository),
            body=b"",
            limit=MAX_ERROR_BYTES,
            quiet_s=_COMMIT_S,
        )
        # Its answer may have been lost, and the session with it: then the blob is there.
        if reply.status not in (200, 201, 204) and not self.has_blob(repository, digest):
            raise self._http.refusal(reply, f"{self.host} has lost the upload of {digest}")

    def _get_manifest(
        self, reference: ImageReference, version: str
    ) -> Manifest | tuple[Platform, ...]:
        reply = self._http.ask(
            "GET",
            f"/v2/{reference.repository}/manifests/{version}",
            _pull_scope(reference.repository),
            headers={"Accept": ", ".join(MANIFEST_TYPES)},
            limit=MAX_MANIFEST_BYTES,
        )
        if reply.status != 200:
            raise self._http.refusal(reply, f"Image not found: {reference}")
        digest = digest_of(reply.body)
        said = reply.header("Docker-Content-Digest")
        if (version.startswith("sha256:") and version != digest) or (
            said.startswith("sha256:") and said != digest
        ):
            raise RegistryFailed(f"{self.host} sent a manifest of {reference} with wrong bytes")
        return parse_manifest(reply.body)


class BlobStream:
    """The bytes of a blob as they come. offset: where they begin, 0 if Range was ignored."""

    def __init__(self, reply: Reply, blob: Descriptor, asked: int, stop: threading.Event) -> None:
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
