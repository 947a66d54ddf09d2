"""What people do without lumed: curl, skopeo and unpackers in a shell. All times in milliseconds.

These write a file and end; lumed also waits until the disk has it. So each is also told with
fsync(2) behind it, and no run leaves writes to the next.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

from bench.disk import StoredImage
from bench.sampling import ms_since

_LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"
_CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"


def pull_zstd_slices(folder: Path, image: StoredImage) -> tuple[float, float]:
    """Fetch, hash and unpack slices; without and with fsync."""
    unpack = "zstd -q -d --sparse -o disk"
    return _time(folder, f"{_curl(image)} | tee >(sha256sum >sum) | {unpack}", "disk")


def pull_gzip_slices(folder: Path, image: StoredImage) -> tuple[float, float]:
    """Fetch, hash and unpack slices; without and with fsync."""
    return _time(folder, f"{_curl(image)} | tee >(sha256sum >sum) | pigz -dc >disk", "disk")


def pull_container_disk(folder: Path, image: StoredImage) -> tuple[float, float]:
    """Fetch and unpack a layer; without and with fsync."""
    return _time(folder, f"{_curl(image)} | zstd -q -dc | tar -x", "disk/disk.qcow2")


def pull_by_skopeo(folder: Path, host: str, image: StoredImage) -> tuple[float, float]:
    """Copy an image, then unpack its zstd slices; without and with fsync."""
    copy = f"skopeo copy -q --src-tls-verify=false docker://{host}/bench/{image.name} dir:image"
    blobs = " ".join(f"image/{digest}" for digest in image.digests)
    return _time(folder, f"{copy} && cat {blobs} | zstd -q -d --sparse -o disk", "disk")


def push_by_skopeo(folder: Path, host: str, disk: Path) -> float:
    """Compress a disk with pigz -1 and copy it to a registry."""
    folder.mkdir()
    try:
        image = folder / "image"
        image.mkdir()
        config = b"{}"
        (image / "version").write_text("Directory Transport Version: 1.1\n")
        (image / hashlib.sha256(config).hexdigest()).write_bytes(config)
        started = time.perf_counter()
        said = _run(folder, f"pigz -1 -c {shlex.quote(str(disk))} | tee image/blob | sha256sum")
        digest = said.split()[0]
        (image / "blob").rename(image / digest)
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST_TYPE,
            "config": _describe(_CONFIG_TYPE, image / hashlib.sha256(config).hexdigest()),
            "layers": [_describe(_LAYER_TYPE, image / digest)],
        }
        (image / "manifest.json").write_text(json.dumps(manifest))
        to = f"docker://{host}/bench/pushed:1"
        _run(folder, f"skopeo copy -q --dest-tls-verify=false dir:image {to}")
        return ms_since(started)
    finally:
        shutil.rmtree(folder)


def _describe(media_type: str, file: Path) -> dict[str, object]:
    size = file.stat().st_size
    return {"mediaType": media_type, "digest": f"sha256:{file.name}", "size": size}


def _curl(image: StoredImage) -> str:
    return f"curl -sSf {' '.join(image.urls)}"


def _time(folder: Path, command: str, result: str) -> tuple[float, float]:
    folder.mkdir()
    try:
        started = time.perf_counter()
        _run(folder, command)
        done_ms = ms_since(started)
        fd = os.open(folder / result, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        return done_ms, ms_since(started)
    finally:
        shutil.rmtree(folder)


def _run(folder: Path, command: str) -> str:
    argv = ["bash", "-o", "pipefail", "-c", command]
    done = subprocess.run(argv, check=True, cwd=folder, stdout=subprocess.PIPE, text=True)
    return done.stdout
