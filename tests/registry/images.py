"""Images in a registry that boot: the tiny guest, in Lume's format."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

from tests.registry.world import Layer, RunningRegistry

LUME_CONFIG = "application/vnd.trycua.lume.config.v1+json"
LUME_NVRAM = "application/vnd.trycua.lume.nvram.v1"
LUME_DISK = "application/vnd.trycua.lume.disk.v1"
SLICE = 8 << 20


def store_lume_image(
    registry: RunningRegistry, name: str, raw: Path, *, os: str = "linux", cpu: str = "1"
) -> list[str]:
    """Store a raw disk as an image of Lume's; the digests of its slices, in their order."""
    content = raw.read_bytes()
    slices = [content[at : at + SLICE] for at in range(0, len(content), SLICE)]
    layers = [Layer(b"no nvram", LUME_NVRAM, {"org.opencontainers.image.title": "nvram.bin"})]
    digests = []
    for number, part in enumerate(slices):
        blob = gzip.compress(part, 1, mtime=0)
        digests.append(f"sha256:{hashlib.sha256(blob).hexdigest()}")
        annotations = {
            "org.opencontainers.image.title": f"disk.img.part.{number}",
            "org.trycua.lume.content.uncompressed-size": str(len(part)),
            "org.trycua.lume.content.uncompressed-digest": (
                f"sha256:{hashlib.sha256(part).hexdigest()}"
            ),
            "org.trycua.lume.part.number": str(number),
            "org.trycua.lume.part.total": str(len(slices)),
            "org.trycua.lume.part.offset": str(number * SLICE),
            "org.trycua.lume.chunk.size": str(len(part)),
        }
        layers.append(Layer(blob, LUME_DISK, annotations))
    config = {
        "mediatype": LUME_CONFIG,
        "os": os,
        "hardwareModel": "",
        "machineIdentifier": "",
        "architecture": "amd64",
        "storage": [],
    }
    registry.store_image(
        name,
        layers,
        config=Layer(json.dumps(config).encode(), LUME_CONFIG),
        annotations={
            "org.trycua.lume.total-uncompressed-size": str(len(content)),
            "org.trycua.lume.os": os,
            "org.trycua.lume.cpu-count": cpu,
            "org.trycua.lume.memory-size": str(256 << 20),
            "org.trycua.lume.display": "800x600",
            "org.trycua.lume.disk-size": str(len(content)),
        },
    )
    return digests
