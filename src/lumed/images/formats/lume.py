"""Lume's OCI format, for pushes since Lume 0.3: slices of a raw disk, each its own gzip member.

Gzip is what Lume writes; lumed's own pushes may also be zstd or raw, told by the first bytes.
The aux and macosvz types are those of Lume 0.3.0 to 0.3.3. There is no architecture in it: Lume
runs on Apple's processors only, so its guests are arm64.
"""

from __future__ import annotations

from collections.abc import Mapping

from lumed.images.formats.plan import (
    DiskPart,
    ImagePlan,
    parse_architecture,
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
from lumed.images.oci import Descriptor, Manifest

CONFIG = "application/vnd.trycua.lume.config.v1+json"
NVRAM = "application/vnd.trycua.lume.nvram.v1"
DISK = "application/vnd.trycua.lume.disk.v1"
_MACOSVZ_CONFIG = "application/vnd.agoda.macosvz.config.v1+json"
_MACOSVZ_DISK = "application/vnd.agoda.macosvz.disk.image.v1"

_PREFIXES = ("org.trycua.lume.", "com.agoda.macosvz.")
# Not Lume's: which processor the guest is for, on images that lumed pushed.
ARCHITECTURE = "org.lumed.architecture"


def is_lume(manifest: Manifest) -> bool:
    """Lume's own test: a layer of the disk type, or a config of the config type."""
    return manifest.config.media_type in (CONFIG, _MACOSVZ_CONFIG) or any(
        map(_is_disk, manifest.layers)
    )


def plan_lume(manifest: Manifest, config: bytes) -> ImagePlan:
    """The plan of an image in Lume's OCI format. Raises RegistryFailed if it is inconsistent."""
    layers = sort_parts(
        filter(_is_disk, manifest.layers),
        lambda layer: parse_count(_get(layer.annotations, "part.number")),
        lambda layer: parse_count(_get(layer.annotations, "part.total")),
        first=0,
    )
    parts, disk_bytes = place_parts(
        map(_part, layers), parse_count(_get(manifest.annotations, "total-uncompressed-size"))
    )
    told = parse_config(config)
    architecture = manifest.annotations.get(ARCHITECTURE) or told.get("architecture") or "arm64"
    return ImagePlan(
        format="lume",
        os=parse_os(_get(manifest.annotations, "os") or told.get("os")),
        parts=parts,
        architecture=parse_architecture(architecture),
        cpu_count=parse_cpu_count(_get(manifest.annotations, "cpu-count")),
        memory_bytes=parse_memory(_get(manifest.annotations, "memory-size")),
        display=parse_display(_get(manifest.annotations, "display")),
        disk_bytes=disk_bytes,
    )


def _is_disk(layer: Descriptor) -> bool:
    return layer.media_type in (DISK, _MACOSVZ_DISK)


def _part(layer: Descriptor) -> DiskPart:
    size = parse_count(_get(layer.annotations, "content.uncompressed-size"))
    if not size:
        size = parse_count(_get(layer.annotations, "chunk.size")) or None
    digest = _get(layer.annotations, "content.uncompressed-digest") or _get(
        layer.annotations, "content.digest"
    )
    return DiskPart(
        layer,
        offset=parse_count(_get(layer.annotations, "part.offset")),
        size_bytes=size,
        content_digest=parse_content_digest(digest),
    )


def _get(annotations: Mapping[str, str], name: str) -> str | None:
    for prefix in _PREFIXES:
        if prefix + name in annotations:
            return annotations[prefix + name]
    return None
