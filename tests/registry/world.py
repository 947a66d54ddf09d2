"""A real registry process (Debian's docker-registry), and images to put into it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import re
import ssl
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
USER, PASSWORD = "nana", "pass:word/ü"


@dataclass(frozen=True, slots=True)
class RunningRegistry:
    """host is "127.0.0.1:port". ca: the file for SSL_CERT_FILE if it speaks TLS."""

    host: str
    data: Path
    login: tuple[str, str] | None = None
    ca: Path | None = None

    def request(
        self,
        method: str,
        target: str,
        body: bytes | IO[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Mapping[str, str], bytes]:
        """One request, with the login if there is one; status, headers, body."""
        sent = dict(headers or {})
        if self.login:
            token = base64.b64encode(":".join(self.login).encode()).decode()
            sent["Authorization"] = f"Basic {token}"
        if self.ca:
            context = ssl.create_default_context(cafile=str(self.ca))
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                self.host, context=context, timeout=30
            )
        else:
            connection = http.client.HTTPConnection(self.host, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, target, body, sent)
            reply = connection.getresponse()
            return reply.status, dict(reply.headers), reply.read()

    def store_blob(self, repository: str, content: bytes | Path) -> tuple[str, int]:
        """Store a blob by one POST and PUT; its digest and size."""
        if isinstance(content, Path):
            with content.open("rb") as file:
                digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
            size = content.stat().st_size
        else:
            digest, size = f"sha256:{hashlib.sha256(content).hexdigest()}", len(content)
        if self.request("HEAD", f"/v2/{repository}/blobs/{digest}")[0] == 200:
            return digest, size
        status, headers, said = self.request("POST", f"/v2/{repository}/blobs/uploads/", b"")
        assert status == 202, said
        target = headers["Location"].partition(self.host)[2]
        target += f"{'&' if '?' in target else '?'}digest={digest}"
        sent = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
        with contextlib.ExitStack() as stack:
            body = stack.enter_context(content.open("rb")) if isinstance(content, Path) else content
            status, _, said = self.request("PUT", target, body, sent)
        assert status == 201, said
        return digest, size

    def store_image(
        self,
        name: str,
        layers: Sequence[Layer],
        *,
        config: Layer | None = None,
        annotations: Mapping[str, str] | None = None,
        **more: object,
    ) -> str:
        """Store an image as `repository:tag`; the manifest's digest. more: keys of the manifest."""
        repository = name.partition(":")[0]
        manifest: dict[str, object] = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": self._describe(repository, config or Layer(b"{}", _OCI_CONFIG)),
            "layers": [self._describe(repository, layer) for layer in layers],
        }
        if annotations:
            manifest["annotations"] = dict(annotations)
        return self.store_manifest(name, {**manifest, **more})

    def store_index(self, name: str, images: Mapping[str, str]) -> str:
        """Store an index as `repository:tag`: images maps "os/architecture" to digests."""
        repository = name.partition(":")[0]
        entries = []
        for platform, digest in images.items():
            system, _, architecture = platform.partition("/")
            _, _, raw = self.request(
                "GET", f"/v2/{repository}/manifests/{digest}", headers={"Accept": OCI_MANIFEST}
            )
            entries.append(
                {
                    "mediaType": OCI_MANIFEST,
                    "digest": digest,
                    "size": len(raw),
                    "platform": {"os": system, "architecture": architecture},
                }
            )
        return self.store_manifest(
            name, {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
        )

    def store_manifest(self, name: str, manifest: Mapping[str, object]) -> str:
        """Store a manifest as `repository:tag`; its digest."""
        repository, _, tag = name.partition(":")
        raw = json.dumps(manifest).encode()
        status, _, said = self.request(
            "PUT",
            f"/v2/{repository}/manifests/{tag}",
            raw,
            {"Content-Type": str(manifest["mediaType"])},
        )
        assert status == 201, said
        return f"sha256:{hashlib.sha256(raw).hexdigest()}"

    def _describe(self, repository: str, layer: Layer) -> dict[str, Any]:
        digest, size = self.store_blob(repository, layer.content)
        described: dict[str, Any] = {
            "mediaType": layer.media_type,
            "digest": digest,
            "size": size,
        }
        if layer.annotations:
            described["annotations"] = dict(layer.annotations)
        return described


@dataclass(frozen=True, slots=True)
class Layer:
    """A blob of an image to store: bytes, or the path of a large one."""

    content: bytes | Path
    media_type: str = "application/octet-stream"
    annotations: Mapping[str, str] = field(default_factory=dict)


_OCI_CONFIG = "application/vnd.oci.image.config.v1+json"


@contextlib.contextmanager
def running_registry(
    folder: Path, *, login: tuple[str, str] | None = None, tls: bool = False
) -> Iterator[RunningRegistry]:
    """A registry on a free port of 127.0.0.1, its data in `folder`; htpasswd with a login."""
    folder.mkdir(parents=True, exist_ok=True)
    data, log = folder / "data", folder / "registry.log"
    serve: dict[str, Any] = {"addr": "127.0.0.1:0", "secret": "of-the-tests"}
    config: dict[str, Any] = {
        "version": 0.1,
        "log": {"level": "info"},
        "storage": {"filesystem": {"rootdirectory": str(data)}, "delete": {"enabled": True}},
        "http": serve,
    }
    ca = None
    if login is not None:
        users = folder / "htpasswd"
        line = subprocess.run(
            ["htpasswd", "-Bin", login[0]], input=login[1].encode(), capture_output=True, check=True
        )
        users.write_bytes(line.stdout)
        config["auth"] = {"htpasswd": {"realm": "the tests", "path": str(users)}}
    if tls:
        ca, key = make_certificate(folder)
        serve["tls"] = {"certificate": str(ca), "key": str(key)}
    settings = folder / "config.yml"
    settings.write_text(json.dumps(config))  # which is YAML, too
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["docker-registry", "serve", str(settings)], stdout=out, stderr=out
        )
    try:
        yield RunningRegistry(_wait_listening(process, log), data, login, ca)
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and registry.example that is its own authority, and its key."""
    certificate, key = folder / "tls.crt", folder / "tls.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=lumed tests"),
            *("-addext", "subjectAltName=IP:127.0.0.1,DNS:registry.example"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


def _wait_listening(process: subprocess.Popen[bytes], log: Path) -> str:
    give_up_at = time.monotonic() + 20
    while True:
        said = log.read_text(errors="replace")
        if match := re.search(r"listening on (127\.0\.0\.1:\d+)", said):
            return match[1]
        assert process.poll() is None, said
        assert time.monotonic() < give_up_at, said
        time.sleep(0.01)
