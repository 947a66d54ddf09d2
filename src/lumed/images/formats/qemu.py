"""The QEMU format of Lume's makers: one qcow2 file in gzip parts, counted from 1."""

from __future__ import annotations

from lumed.images.formats.plan import (
    Compression,
    DiskPart,
    ImagePlan,
    parse_architecture,
    parse_config,
    parse_count,
    parse_cpu_count,
    parse_display,
    parse_memory,
    parse_os,
    place_parts,
    sort_parts,
)
from lumed.images.oci import Descriptor, Manifest

CONFIG = "application/vnd.trycua.qemu.config.v1+json"
_DISK = "application/vnd.trycua.qemu.disk.v1"
_DISK_GZIP = _DISK + "+gzip"
_PREFIX = "org.trycua.qemu."


def is_qemu(manifest: Manifest) -> bool:
    """Whether a layer is a disk of this format."""
    return any(map(_is_disk, manifest.layers))


def plan_qemu(manifest: Manifest, config: bytes) -> ImagePlan:
    """The plan of an image in the QEMU format. Raises RegistryFailed if it is inconsistent."""
    layers = sort_parts(
        filter(_is_disk, manifest.layers),
        lambda layer: parse_count(layer.annotations.get(_PREFIX + "part.number")),
        lambda layer: parse_count(layer.annotations.get(_PREFIX + "part.total")),
        first=1,
    )
    # The manifest's uncompressed-disk-size is not looked at: the parts say it all.
    parts, disk_bytes = place_parts(map(_part, layers), None)
    told = parse_config(config)
    return ImagePlan(
        format="qemu",
        os=parse_os(told.get("guest_os") or manifest.annotations.get(_PREFIX + "guest-os")),
        parts=parts,
        architecture=parse_architecture(told.get("architecture")),
        cpu_count=parse_cpu_count(told.get("cpu")),
        memory_bytes=parse_memory(told.get("ram_mb"), unit=1 << 20),
        display=parse_display(told.get("display")),
        disk_bytes=disk_bytes,
    )


def _is_disk(layer: Descriptor) -> bool:
    return layer.media_type in (_DISK, _DISK_GZIP)


def _part(layer: Descriptor) -> DiskPart:
    if layer.media_type == _DISK:
        return DiskPart(layer, size_bytes=layer.size_bytes, compression=Compression.RAW)
    size = parse_count(layer.annotations.get(_PREFIX + "uncompressed-size"))
    return DiskPart(layer, size_bytes=size, compression=Compression.GZIP)
