"""Manifests of registries, as they come and as they should not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lumed.errors import RegistryFailed
from lumed.images.oci import OCI_INDEX, OCI_MANIFEST, Manifest, digest_of, parse_manifest

DIGEST = "sha256:" + "0f" * 32
BLOB = {"mediaType": "x/y", "digest": DIGEST, "size": 7, "annotations": {"a": "b"}}
MANIFEST: dict[str, Any] = {
    "schemaVersion": 2,
    "mediaType": OCI_MANIFEST,
    "config": BLOB,
    "layers": [BLOB, BLOB],
    "annotations": {"k": "v"},
}


def test_a_manifest_is_read_with_its_digest() -> None:
    raw = json.dumps(MANIFEST).encode()
    manifest = parse_manifest(raw)
    assert isinstance(manifest, Manifest)
    assert manifest.digest == digest_of(raw)
    assert [layer.size_bytes for layer in manifest.layers] == [7, 7]
    assert manifest.layers[0].hex == "0f" * 32
    assert manifest.annotations == {"k": "v"}


def test_an_index_gives_its_platforms() -> None:
    entry = {**BLOB, "platform": {"os": "linux", "architecture": "arm64"}}
    platforms = parse_manifest(json.dumps({"mediaType": OCI_INDEX, "manifests": [entry]}).encode())
    assert isinstance(platforms, tuple)
    assert (platforms[0].architecture, platforms[0].manifest.digest) == ("arm64", DIGEST)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": "x"},
        {"layers": [1]},
        {"layers": [BLOB] * 10_001},
        {"layers": [{**BLOB, "digest": "sha256:../../etc/passwd"}]},
        {"layers": [{**BLOB, "size": -1}]},
        {"layers": [{**BLOB, "size": 1 << 60}]},
        {"layers": [{**BLOB, "size": True}]},
        {"layers": [{**BLOB, "annotations": {"a": 1}}]},
        {"layers": [{"digest": DIGEST, "size": 1}]},
        {"config": None},
        {"mediaType": "text/html"},
    ],
)
def test_a_manifest_that_lies_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RegistryFailed):
        parse_manifest(json.dumps({**MANIFEST, **change}).encode())


@pytest.mark.parametrize("raw", [b"", b"<html>", b"[]", b"\xff"])
def test_what_is_no_manifest_is_refused(raw: bytes) -> None:
    with pytest.raises(RegistryFailed):
        parse_manifest(raw)
