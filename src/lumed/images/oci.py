"""Manifests and indexes of registries, parsed without trusting them.

OCI image specification 1.1, "Image Manifest" and "Image Index"; the Docker media types of both
have the same shape.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lumed.errors import RegistryFailed

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"

MANIFEST_TYPES = (OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_INDEX)
# The distribution specification asks registries to take manifests of at least 4 MiB.
MAX_MANIFEST_BYTES = 4 << 20
MAX_LAYERS = 10_000
# Larger than any disk that is taken here, compressed or not.
_MAX_BLOB_BYTES = 64 << 40
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class ConnectionLost(RegistryFailed):
    """The connection broke, or nothing came for too long: worth another try at the offset."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A blob: digest is "sha256:<hex>", size_bytes its length as it is sent."""

    media_type: str
    digest: str
    size_bytes: int
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def hex(self) -> str:
        """The digest without its algorithm."""
        return self.digest.partition(":")[2]


@dataclass(frozen=True, slots=True)
class Manifest:
    """One image for one platform; raw are the bytes whose sha256 is digest."""

    raw: bytes
    digest: str
    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Platform:
    """One image of an index. architecture in OCI's words: amd64, arm64 …; "" if unsaid."""

    manifest: Descriptor
    os: str
    architecture: str


def digest_of(content: bytes) -> str:
    """The digest of a content, as OCI writes it."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def parse_manifest(raw: bytes) -> Manifest | tuple[Platform, ...]:
    """A manifest, or the platforms of an index. Raises RegistryFailed if it is neither."""
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise RegistryFailed(f"The registry sent a manifest that is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise RegistryFailed("The registry sent a manifest that is no JSON object")
    media_type = body.get("mediaType", OCI_INDEX if "manifests" in body else OCI_MANIFEST)
    if media_type in (OCI_INDEX, DOCKER_INDEX):
        return tuple(map(_platform, _objects(body, "manifests")))
    if media_type not in (OCI_MANIFEST, DOCKER_MANIFEST):
        raise RegistryFailed(f"The registry sent a manifest of unknown type {media_type!r:.120}")
    config = body.get("config")
    if not isinstance(config, dict):
        raise RegistryFailed("The registry sent a manifest without config")
    return Manifest(
        raw=raw,
        digest=digest_of(raw),
        media_type=media_type,
        config=_descriptor(config),
        layers=tuple(map(_descriptor, _objects(body, "layers"))),
        annotations=_annotations(body),
    )


def _platform(value: dict[str, Any]) -> Platform:
    platform = value.get("platform")
    said = platform if isinstance(platform, dict) else {}
    return Platform(_descriptor(value), str(said.get("os", "")), str(said.get("architecture", "")))


def _descriptor(value: dict[str, Any]) -> Descriptor:
    media_type, digest, size = (value.get(key) for key in ("mediaType", "digest", "size"))
    if not isinstance(media_type, str):
        raise RegistryFailed("The registry sent a manifest with a blob that has no mediaType")
    # Also a guard: the digest becomes a file's name.
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise RegistryFailed(f"The registry sent a manifest with the digest {digest!r:.120}")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= _MAX_BLOB_BYTES:
        raise RegistryFailed(f"The registry sent a manifest with a blob of size {size!r:.40}")
    return Descriptor(media_type, digest, size, _annotations(value))


def _annotations(value: dict[str, Any]) -> dict[str, str]:
    found = value.get("annotations") or {}
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise RegistryFailed("The registry sent a manifest with annotations that are no texts")
    return found


def _objects(body: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = body.get(key)
    if (
        not isinstance(found, list)
        or len(found) > MAX_LAYERS
        or not all(isinstance(entry, dict) for entry in found)
    ):
        raise RegistryFailed(f"The registry sent a manifest whose {key} are no list of objects")
    return found
