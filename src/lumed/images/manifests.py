"""What a push writes around a disk: the manifest and config of a Lume image or a container disk.

Lume's format as Lume 0.5 reads it: every annotation is a text; the config needs `os`,
`hardwareModel` and `machineIdentifier` as texts, or the pull ends in "not found"; CPUs, memory
and display stand in the manifest only; a VM without nvram.bin is none. What Lume has no key for
is under org.lumed, which it ignores.
A container disk is KubeVirt's: an OCI image with one layer that holds /disk/<file>.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from lumed.images.formats import lume
from lumed.images.oci import OCI_MANIFEST, Descriptor
from lumed.model.vm import Architecture, Display, Firmware, GuestOs

OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
NVRAM_FULL_SIZE = "org.lumed.nvram.full-size"

_LUME = "org.trycua.lume"
_FIRMWARE = "org.lumed.firmware"
_TITLE = "org.opencontainers.image.title"


@dataclass(frozen=True, slots=True)
class PushSource:
    """A stopped VM as it is pushed; nobody writes to its files meanwhile.

    disk is a qcow2 file, perhaps with a backing chain; uefi_vars is one, too, or None if there
    are none.
    """

    disk: Path
    os: GuestOs
    cpu_count: int
    memory_bytes: int
    display: Display
    network: str
    architecture: Architecture
    firmware: Firmware
    uefi_vars: Path | None


@dataclass(frozen=True, slots=True)
class PushedSlice:
    """A slice of the disk and the blob it became; content_digest is that of the slice itself."""

    offset: int
    length: int
    digest: str
    size_bytes: int
    content_digest: str


def lume_config(source: PushSource) -> bytes:
    """The config blob of a Lume image."""
    return _encode(
        {
            "mediatype": lume.CONFIG,
            "os": str(source.os),
            "hardwareModel": "",
            "machineIdentifier": "",
            "storage": [
                {"mediatype": lume.NVRAM, "file": "nvram.bin"},
                {"mediatype": lume.DISK, "file": "disk.img"},
            ],
            "architecture": str(source.architecture),
        }
    )


def lume_manifest(
    source: PushSource,
    config: Descriptor,
    nvram: Descriptor,
    parts: Sequence[PushedSlice],
    *,
    chunk_bytes: int | None,
    uploaded_at: datetime,
) -> bytes:
    """The manifest of a Lume image; chunk_bytes is None for a disk in a single layer."""
    disk_bytes = sum(part.length for part in parts)
    annotations = {
        f"{_LUME}.upload-time": uploaded_at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        f"{_LUME}.os": str(source.os),
        f"{_LUME}.cpu-count": str(source.cpu_count),
        f"{_LUME}.memory-size": str(source.memory_bytes),
        f"{_LUME}.disk-size": str(disk_bytes),
        f"{_LUME}.display": str(source.display),
        f"{_LUME}.network-mode": source.network,
        lume.ARCHITECTURE: str(source.architecture),
        _FIRMWARE: str(source.firmware),
    }
    if chunk_bytes is not None:
        annotations[f"{_LUME}.total-uncompressed-size"] = str(disk_bytes)
    layers = [_descriptor(nvram, {_TITLE: "nvram.bin", **nvram.annotations})]
    for number, part in enumerate(parts):
        about = {
            _TITLE: "disk.img" if chunk_bytes is None else f"disk.img.part.{number}",
            f"{_LUME}.content.uncompressed-size": str(part.length),
            f"{_LUME}.content.uncompressed-digest": part.content_digest,
        }
        if chunk_bytes is not None:
            about |= {
                f"{_LUME}.part.number": str(number),
                f"{_LUME}.part.total": str(len(parts)),
                f"{_LUME}.part.offset": str(part.offset),
                f"{_LUME}.chunk.size": str(part.length),
            }
        layers.append(_descriptor(Descriptor(lume.DISK, part.digest, part.size_bytes), about))
    return _manifest(_descriptor(config, {_TITLE: "config.json"}), layers, annotations)


def container_config(source: PushSource, layer_content_digest: str) -> bytes:
    """The config blob of a container disk: an OCI image config, without times."""
    return _encode(
        {
            "architecture": str(source.architecture),
            # The platform of the image, which holds no program at all; as KubeVirt's own have it.
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [layer_content_digest]},
        }
    )


def container_manifest(source: PushSource, config: Descriptor, layer: Descriptor) -> bytes:
    """The manifest of a container disk; the same disk gives the same bytes."""
    annotations = {_FIRMWARE: str(source.firmware)}
    return _manifest(_descriptor(config), [_descriptor(layer)], annotations)


def _manifest(
    config: Mapping[str, object],
    layers: Sequence[Mapping[str, object]],
    annotations: Mapping[str, str],
) -> bytes:
    return _encode(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": config,
            "layers": layers,
            "annotations": annotations,
        }
    )


def _descriptor(
    blob: Descriptor, annotations: Mapping[str, str] | None = None
) -> dict[str, object]:
    value: dict[str, object] = {
        "mediaType": blob.media_type,
        "digest": blob.digest,
        "size": blob.size_bytes,
    }
    return value | {"annotations": annotations} if annotations else value


def _encode(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
