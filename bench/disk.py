"""The disk that the figures of images are measured on, and what a registry holds of it.

4 GiB with 768 MiB of data: files of /usr in the order of their names, each from a block on as in
a file system, in stretches of 16 MiB with holes between them.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.registry.world import Layer, RunningRegistry

DISK_BYTES = 4 << 30
SLICE_BYTES = 512 << 20
_STRETCHES = 48
_STRETCH_BYTES = 16 << 20
_DISTANCE_BYTES = 85 << 20
_FIRST_AT = 1 << 20  # where partitions usually begin
_BLOCK = 4096
_STEP = 1 << 20

_CONFIG_TYPE = "application/vnd.trycua.lume.config.v1+json"
_DISK_TYPE = "application/vnd.trycua.lume.disk.v1"
_PREFIX = "org.trycua.lume."
_TAR_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image in a registry; urls are those of its disk's blobs, in their order."""

    name: str
    urls: tuple[str, ...]

    @property
    def digests(self) -> tuple[str, ...]:
        """The hexadecimal part of the blobs' digests."""
        return tuple(url.rpartition(":")[2] for url in self.urls)


def make_disk(folder: Path) -> Path:
    """The raw disk, made at the first call."""
    disk = folder / "disk.raw"
    if not disk.exists():
        folder.mkdir(exist_ok=True)
        content = _read_files()
        waiting = b""
        with disk.open("xb") as file:
            file.truncate(DISK_BYTES)
            for number in range(_STRETCHES):
                file.seek(_FIRST_AT + number * _DISTANCE_BYTES)
                left = _STRETCH_BYTES
                while left:
                    waiting = waiting or next(content)
                    file.write(waiting[:left])
                    taken = min(left, len(waiting))
                    waiting, left = waiting[taken:], left - taken
    return disk


def _read_files() -> Iterator[bytes]:
    while True:  # again from the first file where /usr is small
        for folder, folders, names in os.walk("/usr"):
            folders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                if path.is_file() and not path.is_symlink() and os.access(path, os.R_OK):
                    content = path.read_bytes()
                    if content:
                        yield content + bytes(-len(content) % _BLOCK)


def store_slices(registry: RunningRegistry, disk: Path, kind: str) -> StoredImage:
    """Store the disk in Lume's format, its slices packed by `zstd` or `gzip`."""
    command = ["zstd", "-q", "-T0"] if kind == "zstd" else ["pigz"]
    slices = range(0, DISK_BYTES, SLICE_BYTES)
    layers, urls = [], []
    for number, offset in enumerate(slices):
        packed = disk.with_name(f"slice.{kind}")
        content_digest = _pack(command, disk, offset, packed)
        annotations = {
            "org.opencontainers.image.title": f"disk.img.part.{number}",
            _PREFIX + "content.uncompressed-size": str(SLICE_BYTES),
            _PREFIX + "content.uncompressed-digest": content_digest,
            _PREFIX + "part.number": str(number),
            _PREFIX + "part.total": str(len(slices)),
            _PREFIX + "part.offset": str(offset),
            _PREFIX + "chunk.size": str(SLICE_BYTES),
        }
        digest, _ = registry.store_blob(f"bench/{kind}", packed)
        layers.append(Layer(packed.read_bytes(), _DISK_TYPE, annotations))
        urls.append(f"http://{registry.host}/v2/bench/{kind}/blobs/{digest}")
        packed.unlink()
    registry.store_image(
        f"bench/{kind}:1",
        layers,
        config=Layer(json.dumps({"os": "linux", "architecture": "amd64"}).encode(), _CONFIG_TYPE),
        annotations={
            _PREFIX + "total-uncompressed-size": str(DISK_BYTES),
            _PREFIX + "os": "linux",
            _PREFIX + "cpu-count": "1",
            _PREFIX + "memory-size": str(256 << 20),
        },
    )
    return StoredImage(f"{kind}:1", tuple(urls))


def _pack(command: list[str], disk: Path, offset: int, packed: Path) -> str:
    """Pack a slice into a file; the digest of its content."""
    hasher = hashlib.sha256()
    with packed.open("wb") as output, disk.open("rb") as file:
        packer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output)
        if packer.stdin is None:
            raise RuntimeError("the packer has no input")
        file.seek(offset)
        for _ in range(SLICE_BYTES // _STEP):
            piece = file.read(_STEP)
            hasher.update(piece)
            packer.stdin.write(piece)
        packer.stdin.close()
        if packer.wait():
            raise RuntimeError(f"{command} failed")
    return f"sha256:{hasher.hexdigest()}"


def store_container_disk(registry: RunningRegistry, disk: Path) -> StoredImage:
    """Store the disk as a qcow2 file in a zstd layer."""
    folder = disk.with_name("layer")
    (folder / "disk").mkdir(parents=True)
    qcow2, layer = folder / "disk/disk.qcow2", folder / "layer.tar.zst"
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(disk), str(qcow2)]
    subprocess.run(convert, check=True)
    pack = f"tar -C {folder} -c disk | zstd -q -T0 -o {layer}"
    subprocess.run(["bash", "-o", "pipefail", "-c", pack], check=True)
    qcow2.unlink()
    digest, _ = registry.store_blob("bench/container", layer)
    config = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers"}}
    registry.store_image(
        "bench/container:1",
        [Layer(layer, _TAR_ZSTD)],
        config=Layer(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"),
    )
    layer.unlink()
    url = f"http://{registry.host}/v2/bench/container/blobs/{digest}"
    return StoredImage("container:1", (url,))
