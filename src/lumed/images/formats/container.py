"""KubeVirt's container disks: a container image with one file, raw or qcow2, in disk/."""

from __future__ import annotations

from lumed.images.formats.plan import (
    DiskPart,
    ImagePlan,
    parse_architecture,
    parse_config,
    parse_os,
)
from lumed.images.oci import OCI_CONFIG, Manifest

_LAYERS = (
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
)
_CONFIGS = (OCI_CONFIG, "application/vnd.docker.container.image.v1+json")


def is_container(manifest: Manifest) -> bool:
    """Whether this is a container image; only its layers tell whether it holds a disk."""
    return (
        manifest.config.media_type in _CONFIGS
        and bool(manifest.layers)
        and all(layer.media_type in _LAYERS for layer in manifest.layers)
    )


def plan_container(manifest: Manifest, config: bytes) -> ImagePlan:
    """The plan of a container disk; config is the image's config. Raises NotPossibleHere."""
    told = parse_config(config)
    return ImagePlan(
        format="container",
        os=parse_os(told.get("os")),
        # An upper layer hides what lower ones have; whoever adds a disk does so last.
        parts=tuple(map(DiskPart, reversed(manifest.layers))),
        architecture=parse_architecture(told.get("architecture")),
        in_tar=True,
    )
