"""What is written beside an image's disk: image.json, the last file before it appears."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lumed.images.inspect import DiskFacts
from lumed.model.image import ImageAbout
from lumed.model.vm import Architecture, DiskFormat, Display, Firmware, GuestOs

RECORD = "image.json"


@dataclass(frozen=True, slots=True)
class CachedImage:
    """An image that VMs can rest on. name is the built-in's name, the source's path or its
    reference, as it was when the image was made.
    """

    id: str
    name: str
    disk: Path
    facts: DiskFacts
    kernel: Path | None = None
    initramfs: Path | None = None
    about: ImageAbout = field(default_factory=ImageAbout)

    @property
    def directory(self) -> Path:
        """Where all of it lies."""
        return self.disk.parent


def encode_record(image: CachedImage) -> bytes:
    """The content of image.json."""
    about = image.about
    content = {
        "version": 1,
        "name": image.name,
        "disk": image.disk.name,
        "diskBytes": image.disk.stat().st_size,
        "format": image.facts.format,
        "virtualSizeBytes": image.facts.virtual_size_bytes,
        "firmware": image.facts.firmware,
        "kernel": image.kernel and image.kernel.name,
        "initramfs": image.initramfs and image.initramfs.name,
        "os": about.os,
        "architecture": about.architecture,
        "digest": about.digest,
        "cpuCount": about.cpu_count,
        "memoryBytes": about.memory_bytes,
        "display": about.display and str(about.display),
    }
    return json.dumps(content, indent=2).encode()


def read_image(directory: Path) -> CachedImage | None:
    """The image in a directory; None if it is not complete and as it was published."""
    try:
        content = json.loads((directory / RECORD).read_bytes())
        disk = directory / Path(content["disk"]).name
        found = disk.stat()
        kernel, initramfs = (_extra(directory, content[key]) for key in ("kernel", "initramfs"))
        if found.st_size != content["diskBytes"]:
            return None
        return CachedImage(
            id=directory.name,
            name=str(content["name"]),
            disk=disk,
            facts=DiskFacts(
                DiskFormat(content["format"]),
                int(content["virtualSizeBytes"]),
                found.st_blocks * 512,
                Firmware(content["firmware"]),
            ),
            kernel=kernel,
            initramfs=initramfs,
            about=_about(content),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _extra(directory: Path, name: str | None) -> Path | None:
    if name is None:
        return None
    path = directory / Path(name).name
    path.stat()
    return path


def _about(content: dict[str, Any]) -> ImageAbout:
    # An image that an earlier version made says nothing of these.
    return ImageAbout(
        os=GuestOs(content.get("os", GuestOs.LINUX)),
        architecture=Architecture(content.get("architecture", Architecture.AMD64)),
        digest=content.get("digest"),
        cpu_count=content.get("cpuCount"),
        memory_bytes=content.get("memoryBytes"),
        display=Display.parse(content["display"]) if content.get("display") else None,
    )
