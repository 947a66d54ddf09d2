"""From blobs to a disk: every format, resumed pulls, and registries that lie."""

from __future__ import annotations

import gzip
import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import zstandard

from lumed.errors import RegistryFailed
from lumed.images.formats.plan import ImagePlan
from lumed.images.formats.recognise import plan_image
from lumed.images.oci import Descriptor, Manifest, digest_of
from lumed.images.pull import drop_blobs, pull_disk
from lumed.model.vm import Display, GuestOs
from tests.doubles.blob_source import MemoryBlobs

LUME_DISK = "application/vnd.trycua.lume.disk.v1"
LUME_CONFIG = "application/vnd.trycua.lume.config.v1+json"
SLICE = 256 << 10


def make_disk(slices: int, seed: int = 1) -> bytes:
    """A disk of slices of SLICE bytes: data, holes, blocks with one byte; the second is empty."""
    chance = random.Random(seed)  # noqa: S311 - the same disk each time
    disk = bytearray(slices * SLICE)
    for _ in range(slices * 6):
        at = chance.randrange(len(disk))
        if at // SLICE != 1:
            piece = chance.randbytes(chance.choice((1, 700, 4096, 20_000)))
            disk[at : at + len(piece)] = piece[: len(disk) - at]
    disk[SLICE : 2 * SLICE] = bytes(SLICE)
    return bytes(disk)


def manifest_of(
    layers: list[Descriptor], config: Descriptor | None = None, **annotations: str
) -> Manifest:
    names = {key.replace("__", ".").replace("_", "-"): text for key, text in annotations.items()}
    return Manifest(
        raw=b"{}",
        digest=digest_of(b"{}"),
        media_type="application/vnd.oci.image.manifest.v1+json",
        config=config or Descriptor("application/vnd.oci.empty.v1+json", digest_of(b"{}"), 2),
        layers=tuple(layers),
        annotations=names,
    )


def lume_layer(
    blobs: MemoryBlobs, content: bytes, packed: bytes, number: int, total: int
) -> Descriptor:
    blob = blobs.add(packed)
    prefix = "org.trycua.lume"
    return Descriptor(
        LUME_DISK,
        blob.digest,
        blob.size_bytes,
        {
            f"{prefix}.content.uncompressed-size": str(len(content)),
            f"{prefix}.content.uncompressed-digest": digest_of(content),
            f"{prefix}.part.number": str(number),
            f"{prefix}.part.total": str(total),
            f"{prefix}.part.offset": str(number * SLICE),
        },
    )


def lume_image(blobs: MemoryBlobs, disk: bytes, pack: Any = gzip.compress) -> Manifest:
    total = -(-len(disk) // SLICE)
    slices = [disk[n * SLICE : (n + 1) * SLICE] for n in range(total)]
    layers = [lume_layer(blobs, s, pack(s), n, total) for n, s in enumerate(slices)]
    return manifest_of(
        layers[::-1],
        org__trycua__lume__os="linux",
        org__trycua__lume__cpu_count="4",
        org__trycua__lume__memory_size="4294967296",
        org__trycua__lume__display="1024x768",
        org__trycua__lume__total_uncompressed_size=str(len(disk)),
    )


def pull(blobs: MemoryBlobs, plan: ImagePlan, tmp_path: Path) -> bytes:
    target = tmp_path / "disk"
    target.unlink(missing_ok=True)
    stop = threading.Event()
    pull_disk(blobs, plan, tmp_path, target, stop=stop, report=lambda done, total: None)
    return target.read_bytes()


@pytest.mark.parametrize(
    "pack",
    [gzip.compress, zstandard.compress, bytes],
    ids=["gzip", "zstd", "raw"],
)
def test_lume_slices_become_the_disk(pack: Any, tmp_path: Path) -> None:
    blobs, disk = MemoryBlobs(), make_disk(5)[:-1000]
    plan = plan_image(lume_image(blobs, disk, pack), json.dumps({"os": "linux"}).encode())
    assert pull(blobs, plan, tmp_path) == disk
    assert (plan.os, plan.architecture, plan.cpu_count) == (GuestOs.LINUX, "arm64", 4)
    assert (plan.memory_bytes, plan.display) == (4 << 30, Display(1024, 768))
    drop_blobs(plan, tmp_path)
    assert not list((tmp_path / "sha256").iterdir())


def test_wrong_bytes_are_told_by_their_digest(tmp_path: Path) -> None:
    blobs, disk = MemoryBlobs(), make_disk(3)
    plan = plan_image(lume_image(blobs, disk), b"{}")
    digest = plan.parts[0].blob.digest
    blobs.blobs[digest] = blobs.blobs[digest][:-20] + b"x" * 20
    with pytest.raises(RegistryFailed, match=digest):
        pull(blobs, plan, tmp_path)
