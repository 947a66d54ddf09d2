"""Lume's formats before 0.3: whole disks in parts, each under a media type of something else.

The legacy push made parts in Apple's LZ4 framing; a disk in one piece went as it was. Before
April 2025 a script split the raw disk, and the part's number stood in the media type. There
"+lzfse" and "+gzip" can be read on parts that hold plain bytes of the disk all the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lumed.images.formats.plan import (
    Compression,
    DiskPart,
    ImagePlan,
    parse_config,
    parse_content_digest,
    parse_count,
    parse_cpu_count,
    parse_display,
    parse_memory,
    parse_os,
    place_parts,
    sort_parts,
)
from lumed.images.oci import OCI_CONFIG, Descriptor, Manifest

_LZ4 = "application/octet-stream+lz4"
_GZIP = "application/octet-stream+gzip"
_TAR = "application/vnd.oci.image.layer.v1.tar"
_TITLE = "org.opencontainers.image.title"
_SPLIT = re.compile(
    re.escape(_TAR) + r"(?:\+\w+)?;part\.number=(?P<number>\d{1,6});part\.total=(?P<total>\d{1,6})"
)
# The size that the disk has in the manifest, and in the annotations of config.json.
_DISK_BYTES = "org.trycua.lume.uncompressed-disk-size"
_DISK_BYTES_IN_CONFIG = "com.trycua.lume.disk.uncompressed_size"


def is_legacy(manifest: Manifest) -> bool:
    """Whether parts have one of the types that only Lume gave them, or lie beside its config."""
    kinds = {layer.media_type for layer in manifest.layers}
    if kinds & {_LZ4, _GZIP} or any(map(_SPLIT.fullmatch, kinds)):
        return True
    return _TAR in kinds and find_legacy_config(manifest) is not None


def find_legacy_config(manifest: Manifest) -> Descriptor | None:
    """The layer that is the VM's config.json."""
    return next(
        (
            layer
            for layer in manifest.layers
            if layer.media_type == OCI_CONFIG or layer.annotations.get(_TITLE) == "config.json"
        ),
        None,
    )


def plan_legacy(manifest: Manifest, config: bytes) -> ImagePlan:
    """The plan of an image that Lume pushed before 0.3; config is its config.json.

    Raises RegistryFailed if it is inconsistent.
    """
    told = parse_config(config)
    parts, disk_bytes = place_parts(_find_parts(manifest), _find_disk_bytes(manifest, told))
    return ImagePlan(
        format="lume-legacy",
        os=parse_os(told.get("os")),
        parts=parts,
        architecture="arm64",  # Lume runs on Apple's processors only
        cpu_count=parse_cpu_count(told.get("cpuCount")),
        memory_bytes=parse_memory(told.get("memorySize")),
        display=parse_display(told.get("display")),
        disk_bytes=disk_bytes,
    )


def _find_disk_bytes(manifest: Manifest, told: Mapping[str, object]) -> int | None:
    annotations = told.get("annotations")
    in_config = annotations.get(_DISK_BYTES_IN_CONFIG) if isinstance(annotations, dict) else None
    return parse_count(manifest.annotations.get(_DISK_BYTES, in_config))


def _find_parts(manifest: Manifest) -> list[DiskPart]:
    split = [layer for layer in manifest.layers if _SPLIT.fullmatch(layer.media_type)]
    if split:
        ordered = sort_parts(
            split,
            lambda layer: _number(layer, "number"),
            lambda layer: _number(layer, "total"),
            first=1,
        )
        return [
            DiskPart(layer, size_bytes=layer.size_bytes, compression=Compression.RAW)
            for layer in ordered
        ]
    found = [layer for layer in manifest.layers if layer.media_type == _LZ4]
    if not found:
        # A disk in one piece, which Lume took as it is; gzip is told by the first bytes.
        found = [layer for layer in manifest.layers if layer.media_type in (_TAR, _GZIP)][:1]
        return [DiskPart(layer) for layer in found]
    return [
        DiskPart(
            layer,
            size_bytes=parse_count(layer.annotations.get("org.trycua.lume.uncompressed-size")),
            content_digest=parse_content_digest(
                layer.annotations.get("org.trycua.lume.uncompressed-content-digest")
            ),
            compression=Compression.LZ4,
        )
        for layer in found
    ]


def _number(layer: Descriptor, name: str) -> int | None:
    match = _SPLIT.fullmatch(layer.media_type)
    return int(match[name]) if match else None
