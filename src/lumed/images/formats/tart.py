"""Tart's format (disk v2): slices of a raw disk in Apple's LZ4 framing, in the manifest's order."""

from __future__ import annotations

from lumed.errors import NotPossibleHere
from lumed.images.formats.plan import (
    Compression,
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
)
from lumed.images.oci import Descriptor, Manifest
from lumed.model.vm import Display

_CONFIG = "application/vnd.cirruslabs.tart.config.v1"
_DISK = "application/vnd.cirruslabs.tart.disk.v2"
_PREFIX = "org.cirruslabs.tart."


def is_tart(manifest: Manifest) -> bool:
    """Whether a layer is a disk of this format."""
    return any(layer.media_type == _DISK for layer in manifest.layers)


def find_tart_config(manifest: Manifest) -> Descriptor:
    """The config, which is a layer; the manifest's own one is an empty container's."""
    layers = (layer for layer in manifest.layers if layer.media_type == _CONFIG)
    return next(layers, manifest.config)


def plan_tart(manifest: Manifest, config: bytes) -> ImagePlan:
    """The plan of a Tart image; config is find_tart_config's.

    Raises RegistryFailed if it is inconsistent, NotPossibleHere for a disk that is not raw.
    """
    told = parse_config(config)
    if (disk_format := told.get("diskFormat", "raw")) != "raw":
        raise NotPossibleHere(
            f"The image's disk has the format {disk_format!r:.40}, which only macOS can read"
        )
    parts, disk_bytes = place_parts(
        (_part(layer) for layer in manifest.layers if layer.media_type == _DISK),
        parse_count(manifest.annotations.get(_PREFIX + "uncompressed-disk-size")),
    )
    return ImagePlan(
        format="tart",
        # Tart's oldest configs have neither: they are of macOS on Apple's processors.
        os=parse_os(told.get("os", "darwin")),
        parts=parts,
        architecture=parse_architecture(told.get("arch", "arm64")),
        cpu_count=parse_cpu_count(told.get("cpuCount")),
        memory_bytes=parse_memory(told.get("memorySize")),
        display=_parse_display(told.get("display")),
        disk_bytes=disk_bytes,
    )


def _part(layer: Descriptor) -> DiskPart:
    return DiskPart(
        layer,
        size_bytes=parse_count(layer.annotations.get(_PREFIX + "uncompressed-size")),
        content_digest=parse_content_digest(
            layer.annotations.get(_PREFIX + "uncompressed-content-digest")
        ),
        compression=Compression.LZ4,
    )


def _parse_display(value: object) -> Display | None:
    if isinstance(value, dict):
        return parse_display(f"{value.get('width')}x{value.get('height')}")
    return parse_display(value)
