"""Every format, and every lie about one, through a real server and a real registry."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests.doubles import apple_lz4
from tests.registry.faults import FaultProxy
from tests.registry.images import SLICE, store_lume_image
from tests.registry.world import Layer, RunningRegistry
from tests.system.harness import Server, running_server

TAR = "application/vnd.oci.image.layer.v1.tar"
LEGACY, QEMU = "org.trycua.lume", "org.trycua.qemu"
TART = "org.cirruslabs.tart"
pack_gzip = partial(gzip.compress, compresslevel=1, mtime=0)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


def make_disk(slices: int = 2) -> bytes:
    """Data, holes, and an end that no block ends at."""
    chance = random.Random(3)  # noqa: S311 - the same disk each time
    disk = bytearray(slices * SLICE)
    for at in range(0, len(disk), 1 << 20):
        disk[at : at + 40_000] = chance.randbytes(40_000)
    return bytes(disk)[:-512]


DISK = make_disk()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all images."""
    home = tmp_path_factory.mktemp("formats") / "home"
    with running_server(home, home / "cache") as server:
        yield server


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def store_legacy(registry: RunningRegistry, name: str, disk: bytes) -> None:
    layers = [
        Layer(
            apple_lz4.pack(part),
            "application/octet-stream+lz4",
            {
                f"{LEGACY}.uncompressed-size": str(len(part)),
                f"{LEGACY}.uncompressed-content-digest": digest_of(part),
            },
        )
        for part in cut(disk)
    ]
    config = Layer(
        b'{"os": "linux", "cpuCount": 2, "memorySize": 268435456, "display": "800x600"}',
        "application/vnd.oci.image.config.v1+json",
        {"org.opencontainers.image.title": "config.json"},
    )
    size = {f"{LEGACY}.uncompressed-disk-size": str(len(disk))}
    registry.store_image(name, [*layers, config], config=config, annotations=size)


def store_qemu(registry: RunningRegistry, name: str, disk: bytes) -> None:
    layers = [
        Layer(
            pack_gzip(part),
            "application/vnd.trycua.qemu.disk.v1+gzip",
            {
                f"{QEMU}.part.number": str(number),
                f"{QEMU}.part.total": str(len(cut(disk))),
                f"{QEMU}.uncompressed-size": str(len(part)),
            },
        )
        for number, part in enumerate(cut(disk), start=1)
    ]
    config = {"guest_os": "linux", "cpu": 2, "ram_mb": 256, "disk_format": "qcow2"}
    media_type = "application/vnd.trycua.qemu.config.v1+json"
    registry.store_image(name, layers, config=Layer(json.dumps(config).encode(), media_type))


def store_tart(registry: RunningRegistry, name: str, disk: bytes) -> None:
    config = {"os": "linux", "arch": "amd64", "cpuCount": 2, "memorySize": 256 << 20}
    layers = [Layer(json.dumps(config).encode(), "application/vnd.cirruslabs.tart.config.v1")]
    layers += [
        Layer(
            apple_lz4.pack(part),
            "application/vnd.cirruslabs.tart.disk.v2",
            {
                f"{TART}.uncompressed-size": str(len(part)),
                f"{TART}.uncompressed-content-digest": digest_of(part),
            },
        )
        for part in cut(disk)
    ]
    size = {f"{TART}.uncompressed-disk-size": str(len(disk))}
    registry.store_image(name, layers, annotations=size)


def store_container(
    registry: RunningRegistry, name: str, layer: bytes, media_type: str = TAR
) -> None:
    config = Layer(
        b'{"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}',
        "application/vnd.oci.image.config.v1+json",
    )
    registry.store_image(name, [Layer(layer, media_type)], config=config)


def cut(disk: bytes) -> list[bytes]:
    return [disk[at : at + SLICE] for at in range(0, len(disk), SLICE)]


def make_tar(name: str, content: bytes = b"", **fields: Any) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        for key, value in fields.items():
            setattr(info, key, value)
        archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def make_qcow2(disk: bytes, folder: Path, *options: str) -> bytes:
    (folder / "raw").write_bytes(disk)
    target = folder / "made.qcow2"
    command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options]
    subprocess.run([*command, str(folder / "raw"), str(target)], check=True)
    return target.read_bytes()


def pull(server: Server, host: str, name: str, status: int = 200) -> dict[str, Any]:
    body = {"image": name, "registry": host, "organization": ""}
    return dict(server.call("POST", "/pull", status, json=body))


@pytest.mark.parametrize("form", ["legacy", "qemu", "tart", "container-raw", "container-qcow2"])
def test_each_format_gives_the_disk_byte_for_byte(
    server: Server, registry: RunningRegistry, tmp_path: Path, form: str
) -> None:
    qcow2 = make_qcow2(DISK, tmp_path)
    if form == "legacy":
        store_legacy(registry, f"{form}:1", DISK)
    elif form == "qemu":
        store_qemu(registry, f"{form}:1", qcow2)
    elif form == "tart":
        store_tart(registry, f"{form}:1", DISK)
    elif form == "container-raw":
        store_container(registry, f"{form}:1", pack_gzip(make_tar("disk/a.img", DISK)))
    else:
        layer = zstandard.compress(make_tar("disk/disk.qcow2", qcow2))
        store_container(registry, f"{form}:1", layer, TAR + "+zstd")
    pull(server, registry.host, f"{form}:1")
    found = server.read_disk(form, tmp_path)
    # QEMU's disks end at a whole sector.
    assert found == DISK
    if not form.startswith("container"):
        vm = server.vm(form)
        assert (vm["cpu"], vm["memory"]) == (2, "256MB")
    # Holes stay holes.
    [image] = [i for i in server.call("GET", "/images", 200) if f"/{form}:1" in i["name"]]
    assert image["size"] < len(DISK) // 4


def _with_backing(folder: Path) -> bytes:
    target = folder / "overlay.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-F", "raw"]
    subprocess.run([*command, "-b", "/etc/passwd", str(target), "1M"], check=True)
    return target.read_bytes()


def _petabyte(folder: Path) -> bytes:
    content = bytearray(make_qcow2(DISK, folder))
    content[24:32] = (1 << 50).to_bytes(8, "big")
    return bytes(content)


@pytest.mark.parametrize(
    ("name", "layer", "words"),
    [
        ("backing", lambda at: make_tar("disk/d.qcow2", _with_backing(at)), "backing file"),
        ("petabyte", lambda at: make_tar("disk/d.qcow2", _petabyte(at)), "64 TB"),
        ("dots", lambda _: make_tar("disk/../../etc/d", DISK), ""),
        ("link", lambda _: make_tar("disk/d", type=tarfile.SYMTYPE, linkname="/etc/passwd"), ""),
        ("hardlink", lambda _: make_tar("disk/d", type=tarfile.LNKTYPE, linkname="/etc/x"), ""),
        ("device", lambda _: make_tar("disk/d", type=tarfile.BLKTYPE), ""),
        ("empty", lambda _: make_tar("etc/d", DISK), ""),
        ("truncated", lambda _: pack_gzip(make_tar("disk/d", DISK))[:-2000], ""),
        ("garbage", lambda _: b"no tar at all" * 1000, ""),
    ],
)
def test_a_container_disk_that_lies_is_refused_and_leaves_nothing(
    server: Server, registry: RunningRegistry, tmp_path: Path, name: str, layer: Any, words: str
) -> None:
    store_container(registry, f"{name}:1", layer(tmp_path))
    body = {"image": f"{name}:1", "registry": registry.host, "organization": ""}
    reply = server.call("POST", "/pull", json=body)
    assert reply["code"] in ("registry_failed", "invalid_field", "not_possible_here"), reply
    assert words in reply["message"]
    assert str(server.home) not in reply["message"]
    assert not (server.home / "vms" / name).exists()
    assert all(f"/{name}:1" not in i["name"] for i in server.call("GET", "/images", 200))
    assert not any((server.home / "cache" / "images" / ".staging").iterdir())
    server.call("DELETE", f"/vms/{name}", 200)


def test_an_unknown_format_names_its_media_types(server: Server, registry: RunningRegistry) -> None:
    registry.store_image("helm:1", [Layer(b"x", "application/vnd.cncf.helm.chart.v1.tar+gzip")])
    assert "helm.chart" in pull(server, registry.host, "helm:1", 502)["message"]


@pytest.fixture
def slices(registry: RunningRegistry, tmp_path: Path) -> list[str]:
    """The image flaky:1, and its slices' digests."""
    (tmp_path / "raw").write_bytes(DISK)
    return store_lume_image(registry, "flaky:1", tmp_path / "raw")


@pytest.mark.parametrize("fault", ["flip", "shorten", "gone", "forbidden"])
def test_wrong_bytes_are_told_and_the_next_pull_is_right(
    server: Server, proxy: FaultProxy, slices: list[str], tmp_path: Path, fault: str
) -> None:
    path = f"/blobs/{slices[1]}"
    if fault == "flip":
        proxy.flip(path, at=5000)
    elif fault == "shorten":
        proxy.shorten(path, to=5000, times=0)
    else:
        proxy.answer(path, 404 if fault == "gone" else 403)
    failed = pull(server, proxy.host, "flaky:1", 502)
    if fault in ("flip", "gone"):
        assert slices[1] in failed["message"]
    assert server.call("GET", "/vms/flaky", 400)["code"] == "pull_failed"
    proxy.clear()
    pull(server, proxy.host, "flaky:1")
    assert server.read_disk("flaky", tmp_path) == DISK
    server.call("DELETE", "/vms/flaky", 200)
    server.call("POST", "/prune", 200)


def test_a_line_that_is_cut_again_and_again_only_delays(
    server: Server, proxy: FaultProxy, slices: list[str], tmp_path: Path
) -> None:
    chance = random.Random(5)  # noqa: S311
    for digest in slices:
        for after in sorted(chance.randrange(1, 80_000) for _ in range(4)):
            proxy.cut(f"/blobs/{digest}", after=after)
    proxy.answer("/manifests/", 503, times=1, retry_after=0)
    proxy.answer(f"/blobs/{slices[0]}", 429, times=1, retry_after=0)
    pull(server, proxy.host, "flaky:1")
    assert server.read_disk("flaky", tmp_path) == DISK
    server.call("DELETE", "/vms/flaky", 200)
    server.call("POST", "/prune", 200)


def test_a_server_that_is_killed_at_any_byte_of_a_pull_goes_on_at_the_next(
    proxy: FaultProxy, registry: RunningRegistry, slices: list[str], tmp_path: Path
) -> None:
    chance = random.Random(11)  # noqa: S311
    sizes = {
        digest: int(registry.request("HEAD", f"/v2/flaky/blobs/{digest}")[1]["Content-Length"])
        for digest in slices
    }
    home = tmp_path / "home"
    kills = 5
    with running_server(home, home / "cache") as server:
        for _ in range(kills):
            digest = chance.choice(slices)
            go_on = threading.Event()
            proxy.hold(f"/blobs/{digest}", go_on, after=chance.randrange(sizes[digest]))
            body = {"image": "flaky:1", "registry": proxy.host, "organization": ""}
            server.call("POST", "/pull/start", 202, json=body)
            # Held, unless what is left of this blob ends before.
            held = proxy.noticed.wait(2)
            server.kill()
            go_on.set()
            proxy.clear()
            server.start()
            if held:
                assert "The server ended" in server.call("GET", "/vms/flaky", 400)["message"]
            elif server.vm("flaky").get("state") == "stopped":
                break
        else:
            pull(server, proxy.host, "flaky:1")
        assert server.read_disk("flaky", tmp_path) == DISK
        # Each byte once, and at most a chunk more for each kill.
        for digest, size in sizes.items():
            assert proxy.served[digest] <= size + kills * (1 << 20)
        assert not any((home / "cache" / "images" / ".staging").iterdir())


@needs_root
def test_a_cache_that_runs_full_at_any_write_says_so_and_loses_nothing(
    registry: RunningRegistry, slices: list[str], tmp_path: Path
) -> None:
    home, small = tmp_path / "home", tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "none", small], check=True)
    try:
        with running_server(home, small / "cache") as server:
            outcomes = []
            for kilobytes in (128, 400, 700, 900, 1100, 1400, 1800, 2600, 8000):
                remount = ["mount", "-o", f"remount,size={kilobytes}k", str(small)]
                subprocess.run(remount, check=True)
                body = {"image": "flaky:1", "registry": registry.host, "organization": ""}
                with server.client() as client:
                    reply = client.post("/pull", json=body)
                outcomes.append(reply.status_code)
                if reply.status_code == 200:
                    break
                assert reply.status_code == 507, reply.text
                assert server.call("GET", "/vms", 200) == []
                assert server.call("GET", "/images", 200) == []
            assert outcomes[-1] == 200
            assert len(outcomes) > 3
            assert server.read_disk("flaky", tmp_path) == DISK
            assert server.call("POST", "/prune", 200)["freed"] == 0
    finally:
        subprocess.run(["umount", "-l", str(small)], check=False)
