"""A disk goes to a real registry, and everything of it is there, once."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lumed.errors import InvalidField, NoSpace, RegistryFailed, ToolFailed
from lumed.images import push
from lumed.images.formats.plan import ImagePlan
from lumed.images.formats.recognise import plan_image
from lumed.images.gzipper import Gzipper
from lumed.images.manifests import PushSource
from lumed.images.oci import OCI_MANIFEST
from lumed.images.pull import pull_disk
from lumed.images.push import push_image
from lumed.images.reference import ImageReference
from lumed.images.registry import Registry
from lumed.model.request import PushFormat
from lumed.model.vm import Architecture, Display, Firmware, GuestOs
from lumed.osproc import find_process, wait_gone
from lumed.threads import Stopped
from tests.registry.faults import FaultProxy
from tests.registry.world import RunningRegistry

MIB = 1 << 20
CHUNK = 4 * MIB
SIZE = 33 * MIB + 1536
UNIQUE_SLICES = 6
LUME = "org.trycua.lume"
NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)


def qemu_img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *arguments], check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk of nine slices on a compressed, smaller base; raw beside it is its content.

    0 and 2 hold the same, 1, 3 and 5 nothing (5 not since something else was there), 4 a little,
    6 and 7 what the base has, 8 is short.
    """
    folder = tmp_path_factory.mktemp("disk")
    fill = random.Random(7).randbytes  # noqa: S311
    once = fill(CHUNK // 2) + bytes(CHUNK // 4) + b"text" * (CHUNK // 16)
    base = bytearray(32 * MIB)
    base[5 * CHUNK : 6 * CHUNK] = fill(CHUNK)
    base[6 * CHUNK : 7 * CHUNK] = fill(CHUNK)
    base[7 * CHUNK : 7 * CHUNK + 100_000] = b"base " * 20_000
    (folder / "base.raw").write_bytes(base)
    qemu_img("convert", "-c", "-O", "qcow2", folder / "base.raw", folder / "base.qcow2")
    content = base + bytes(SIZE - len(base))
    content[0:CHUNK] = content[2 * CHUNK : 3 * CHUNK] = once
    content[4 * CHUNK + 777 : 4 * CHUNK + 10_777] = fill(10_000)
    content[5 * CHUNK : 6 * CHUNK] = bytes(CHUNK)
    content[-1000:] = fill(1000)
    (folder / "raw").write_bytes(content)
    made = folder / "disk.qcow2"
    backing = ("-B", folder / "base.qcow2", "-F", "qcow2")
    qemu_img("convert", "-f", "raw", "-O", "qcow2", *backing, folder / "raw", made)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", folder / "raw", made)
    return made


class World:
    """A registry behind a proxy, and a home for pushes."""

    def __init__(self, proxy: FaultProxy, registry: RunningRegistry, home: Path) -> None:
        self.proxy = proxy
        self.registry = registry
        self.work = home / "work"
        self.records = home / "records"
        # Of its own in each test: the registry's store is shared by the session.
        self.repository = f"push/{home.name.replace('_', '-')}".lower()
        self.stop = threading.Event()
        self.reported: list[tuple[str, int, int]] = []

    def refer(self, tag: str) -> ImageReference:
        return ImageReference(self.proxy.host, self.repository, tag=tag)

    def push(
        self,
        source: PushSource,
        *tags: str,
        format: PushFormat = PushFormat.LUME,
        wrap: Callable[[Registry], push.PushTarget] = lambda client: client,
        report: push.Report | None = None,
        **options: Any,
    ) -> str:
        with Registry(self.proxy.host, first_delay_s=0.001) as client:
            return push_image(
                wrap(client),
                [self.refer(tag) for tag in tags or ("1",)],
                source,
                format=format,
                work=self.work,
                records=self.records,
                stop=self.stop,
                report=report or (lambda *said: self.reported.append(said)),
                uploaded_at=NOON,
                **{"chunk_bytes": CHUNK, **options},
            )

    def get_manifest(self, tag: str = "1") -> dict[str, Any]:
        target = f"/v2/{self.repository}/manifests/{tag}"
        status, headers, body = self.registry.request("GET", target, None, {"Accept": OCI_MANIFEST})
        assert status == 200, body
        assert headers["Docker-Content-Digest"] == f"sha256:{hashlib.sha256(body).hexdigest()}"
        parsed: dict[str, Any] = json.loads(body)
        return parsed

    def get_blob(self, descriptor: dict[str, Any]) -> bytes:
        target = f"/v2/{self.repository}/blobs/{descriptor['digest']}"
        status, _, body = self.registry.request("GET", target)
        assert status == 200
        assert len(body) == descriptor["size"]
        assert f"sha256:{hashlib.sha256(body).hexdigest()}" == descriptor["digest"]
        return body

    def get_disk(self, tag: str = "1") -> bytes:
        """The disk as Lume puts it together from the manifest, its annotations checked."""
        layers = self.get_manifest(tag)["layers"][1:]
        content = bytearray()
        for number, layer in enumerate(layers):
            said = layer["annotations"]
            part = gzip.decompress(self.get_blob(layer))
            assert said[f"{LUME}.content.uncompressed-size"] == str(len(part))
            digest = f"sha256:{hashlib.sha256(part).hexdigest()}"
            assert said[f"{LUME}.content.uncompressed-digest"] == digest
            assert said[f"{LUME}.part.number"] == str(number)
            assert said[f"{LUME}.part.total"] == str(len(layers))
            assert said[f"{LUME}.part.offset"] == str(len(content))
            content += part
        return bytes(content)

    def skopeo(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["skopeo", *arguments], capture_output=True, timeout=60, check=False)


@pytest.fixture
def world(proxy: FaultProxy, registry: RunningRegistry, tmp_path: Path) -> World:
    return World(proxy, registry, tmp_path)


def vm(disk: Path, **changes: Any) -> PushSource:
    facts: dict[str, Any] = {
        "os": GuestOs.LINUX,
        "cpu_count": 3,
        "memory_bytes": 2 << 30,
        "display": Display(800, 600),
        "network": "nat",
        "architecture": Architecture.AMD64,
        "firmware": Firmware.BIOS,
        "uefi_vars": None,
    }
    return PushSource(disk, **facts | changes)


def test_a_pushed_lume_image_is_the_disk_byte_for_byte(world: World, disk: Path) -> None:
    world.push(vm(disk))
    assert world.get_disk() == (disk.parent / "raw").read_bytes()


def test_a_lume_image_says_what_lume_needs_to_pull_it(world: World, disk: Path) -> None:
    digest = world.push(vm(disk), "1", "latest")
    manifest = world.get_manifest()
    assert manifest == world.get_manifest("latest") == world.get_manifest(digest)
    assert (manifest["schemaVersion"], manifest["mediaType"]) == (2, OCI_MANIFEST)
    assert manifest["annotations"] == {
        f"{LUME}.upload-time": "2026-11-24T12:00:00Z",
        f"{LUME}.total-uncompressed-size": str(SIZE),
        f"{LUME}.os": "linux",
        f"{LUME}.cpu-count": "3",
        f"{LUME}.memory-size": str(2 << 30),
        f"{LUME}.disk-size": str(SIZE),
        f"{LUME}.display": "800x600",
        f"{LUME}.network-mode": "nat",
        "org.lumed.architecture": "amd64",
        "org.lumed.firmware": "bios",
    }
    config = json.loads(world.get_blob(manifest["config"]))
    assert manifest["config"]["mediaType"] == config["mediatype"]
    assert [config[key] for key in ("os", "hardwareModel", "machineIdentifier")] == [
        "linux",
        "",
        "",
    ]
    assert config["architecture"] == "amd64"
    nvram, first, *_ = manifest["layers"]
    assert nvram["mediaType"] == "application/vnd.trycua.lume.nvram.v1"
    assert nvram["annotations"] == {"org.opencontainers.image.title": "nvram.bin"}
    assert world.get_blob(nvram) == bytes(512)
    assert first["mediaType"] == "application/vnd.trycua.lume.disk.v1"
    assert first["annotations"]["org.opencontainers.image.title"] == "disk.img.part.0"
    assert first["annotations"][f"{LUME}.chunk.size"] == str(CHUNK)


class Pulled:
    """What pull_disk needs of a registry: the blobs of one repository."""

    def __init__(self, client: Registry, repository: str) -> None:
        self.get_blob = partial(client.get_blob, repository)
        self.open_blob = partial(client.open_blob, repository)


def pull(world: World, target: Path) -> ImagePlan:
    """Pull the tag "1" as this server would; the plan says what the image says."""
    with Registry(world.proxy.host) as client:
        manifest = client.get_manifest(world.refer("1"), ["amd64"])
        plan = plan_image(manifest, client.get_blob(world.repository, manifest.config))
        source, blobs = Pulled(client, world.repository), target.with_name("blobs")
        pull_disk(source, plan, blobs, target, stop=world.stop, report=lambda *_: None)
    return plan


@pytest.mark.parametrize("single_layer", [False, True])
def test_what_was_pushed_is_pulled_byte_for_byte(
    world: World, disk: Path, tmp_path: Path, single_layer: bool
) -> None:
    world.push(vm(disk), single_layer=single_layer)
    plan = pull(world, tmp_path / "pulled")
    assert (plan.architecture, plan.cpu_count) == ("amd64", 3)
    assert (plan.memory_bytes, plan.display) == (2 << 30, Display(800, 600))
    assert (tmp_path / "pulled").read_bytes() == (disk.parent / "raw").read_bytes()


def test_a_pushed_container_disk_is_pulled_with_the_same_content(
    world: World, disk: Path, tmp_path: Path
) -> None:
    world.push(vm(disk), format=PushFormat.CONTAINER_DISK)
    plan = pull(world, tmp_path / "pulled")
    assert plan.architecture == "amd64"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", tmp_path / "pulled", tmp_path / "content")
    assert (tmp_path / "content").read_bytes() == (disk.parent / "raw").read_bytes()


def test_a_disk_in_one_layer_has_no_part_keys(world: World, disk: Path) -> None:
    world.push(vm(disk), single_layer=True)
    _, layer = world.get_manifest()["layers"]
    assert gzip.decompress(world.get_blob(layer)) == (disk.parent / "raw").read_bytes()
    assert layer["annotations"]["org.opencontainers.image.title"] == "disk.img"
    assert layer["annotations"][f"{LUME}.content.uncompressed-size"] == str(SIZE)
    assert not any(".part." in key or ".chunk." in key for key in layer["annotations"])


def test_uefi_variables_go_along_without_the_zeros_behind_them(
    world: World, disk: Path, tmp_path: Path
) -> None:
    raw, variables = tmp_path / "vars.raw", tmp_path / "vars.qcow2"
    raw.write_bytes((b"\0\1boot entries\xff").ljust(MIB, b"\0"))
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, variables)
    world.push(vm(disk, firmware=Firmware.UEFI, uefi_vars=variables))
    nvram = world.get_manifest()["layers"][0]
    assert world.get_blob(nvram) == b"\0\1boot entries\xff"
    assert nvram["annotations"]["org.lumed.nvram.full-size"] == str(MIB)


def test_equal_slices_are_sent_once_and_empty_ones_compressed_once(
    world: World, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = count_members(monkeypatch)
    world.push(vm(disk))
    digests = [layer["digest"] for layer in world.get_manifest()["layers"][1:]]
    assert digests[0] == digests[2]
    assert digests[1] == digests[3] == digests[5]
    assert len(set(digests)) == UNIQUE_SLICES
    small = 2  # config and nvram
    assert world.proxy.count("POST", "/uploads/") == UNIQUE_SLICES + small
    assert len(members) == UNIQUE_SLICES + 1  # that 0 and 2 are equal shows only afterwards


def count_members(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by one with each gzip member that is made."""
    made: list[object] = []
    write = Gzipper.write

    def counted(self: Gzipper, *arguments: Any) -> Any:
        made.append(arguments)
        return write(self, *arguments)

    monkeypatch.setattr(Gzipper, "write", counted)
    return made


def test_what_was_pushed_before_is_neither_compressed_nor_sent_again(
    world: World, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.push(vm(disk), "1")
    world.proxy.clear()
    members = count_members(monkeypatch)
    world.push(vm(disk), "2")
    assert members == []
    assert world.proxy.count("POST", "/uploads/") == 0
    assert world.get_manifest("1") == world.get_manifest("2")
    assert world.reported[-1][1] == world.reported[-1][2] > 0


def test_blobs_that_the_registry_has_are_not_sent_when_nothing_is_recorded(
    world: World, disk: Path
) -> None:
    world.push(vm(disk), "1")
    world.proxy.clear()
    world.records = world.records.with_name("no-records")
    world.push(vm(disk), "2")
    assert world.proxy.count("POST", "/uploads/") == 0
    assert world.get_manifest("1") == world.get_manifest("2")


def test_a_changed_disk_is_read_again(world: World, disk: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", disk, "-F", "qcow2", own)
    world.push(vm(own), "1")
    write = ("qemu-io", "-f", "qcow2", "-c", f"write -P 0x77 {CHUNK} 1M")
    subprocess.run([*write, str(own)], check=True, capture_output=True, timeout=30)
    world.proxy.clear()
    world.push(vm(own), "2")
    expected = bytearray((disk.parent / "raw").read_bytes())
    expected[CHUNK : CHUNK + MIB] = b"\x77" * MIB
    assert world.get_disk("2") == expected
    assert world.proxy.count("POST", "/uploads/") == 1


def test_progress_only_grows_and_ends_at_the_total(world: World, disk: Path) -> None:
    world.push(vm(disk))
    said = [(done, total) for stage, done, total in world.reported if stage == "pushing"]
    assert said == sorted(said)
    assert len({total for _, total in said}) == 1
    assert said[-1][0] == said[-1][1]


class Failing:
    """A registry that is full after so many blobs."""

    def __init__(self, client: Registry, uploads: int) -> None:
        self._client = client
        self._left = threading.Semaphore(uploads)
        self.has_blob = client.has_blob
        self.put_manifest = client.put_manifest

    def upload_blob(
        self, repository: str, path: Path, digest: str, *, report: Callable[[int], None]
    ) -> None:
        if not self._left.acquire(blocking=False):
            raise RegistryFailed("full")
        self._client.upload_blob(repository, path, digest, report=report)


def test_a_push_that_the_registry_failed_goes_on_where_it_stopped(world: World, disk: Path) -> None:
    with pytest.raises(RegistryFailed, match="full"):
        world.push(vm(disk), wrap=lambda client: Failing(client, 3))
    assert list(world.work.iterdir()) == []
    assert world.proxy.count("PUT", "/manifests/") == 0
    world.push(vm(disk))
    manifest = world.get_manifest()
    blobs = {b["digest"]: b["size"] for b in [manifest["config"], *manifest["layers"]]}
    manifest_bytes = sum(
        int(seen.headers["Content-Length"])
        for seen in world.proxy.requests
        if "/manifests/" in seen.target
    )
    assert world.proxy.uploaded == sum(blobs.values()) + manifest_bytes
    assert world.get_disk() == (disk.parent / "raw").read_bytes()


def test_a_line_that_is_cut_in_the_middle_of_blobs_hurts_no_push(world: World, disk: Path) -> None:
    world.proxy.cut_upload(after=1_000_000, times=2)
    world.push(vm(disk))
    assert world.get_disk() == (disk.parent / "raw").read_bytes()


PUSH = """
import sys, threading
from pathlib import Path
from lumed.images.manifests import PushSource
from lumed.images.push import push_image
from lumed.model.request import PushFormat
from lumed.images.reference import ImageReference
from lumed.images.registry import Registry
from lumed.model.vm import Architecture, Display, Firmware, GuestOs
host, repository, disk, work, records = sys.argv[1:]
source = PushSource(Path(disk), GuestOs.LINUX, 1, 1, Display(), "nat", Architecture.AMD64,
    Firmware.BIOS, None)
with Registry(host) as client:
    push_image(client, [ImageReference(host, repository, tag="1")], source, format=PushFormat.LUME,
        work=Path(work), records=Path(records), stop=threading.Event(), report=lambda *_: None,
        chunk_bytes=4 << 20)
"""


@pytest.mark.parametrize("held", ["/uploads/", "/manifests/"])
async def test_a_killed_push_leaves_no_process_and_the_next_one_sweeps_and_goes_on(
    world: World, disk: Path, tmp_path: Path, held: str
) -> None:
    own = tmp_path / "killed.qcow2"  # no other process has this name in its arguments
    qemu_img("create", "-f", "qcow2", "-b", disk, "-F", "qcow2", own)
    # Killed while the first blob is on its way, and once all are there.
    go_on = threading.Event()
    world.proxy.hold(held, go_on)
    where = [world.proxy.host, world.repository, *map(str, (own, world.work, world.records))]
    child = subprocess.Popen([sys.executable, "-c", PUSH, *where])  # noqa: ASYNC220
    try:
        assert world.proxy.noticed.wait(60)
        servers = [found for found in map(find_process, find_servers(own)) if found]
        assert servers
    finally:
        child.kill()
        child.wait()
        go_on.set()
    for server in servers:
        assert await wait_gone(server, 10)
    assert len(list(world.work.iterdir())) == 1
    there = stored_blobs(world.proxy)
    assert held == "/uploads/" or len(there) == UNIQUE_SLICES + 2
    world.proxy.clear()
    world.push(vm(own), "2")
    assert not there & stored_blobs(world.proxy)
    assert list(world.work.iterdir()) == []
    assert world.get_disk("2") == (disk.parent / "raw").read_bytes()


def stored_blobs(proxy: FaultProxy) -> set[str]:
    """The digests of the uploads that were brought to their end."""
    return {
        seen.target.partition("digest=")[2].partition("&")[0]
        for seen in proxy.requests
        if seen.method == "PUT" and "digest=" in seen.target and seen.status == 201
    }


def find_servers(disk: Path) -> list[int]:
    """The pids of programs that were started with this path."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"qemu-nbd" in words[0] and os.fsencode(disk) in words:
                found.append(int(process.name))
    return found


@pytest.mark.parametrize("least_done", [0, 1])
def test_a_stopped_push_ends_at_once_and_leaves_nothing(
    world: World, disk: Path, least_done: int
) -> None:
    def stop_when_done(_stage: str, done: int, _total: int) -> None:
        if done >= least_done:
            world.stop.set()

    with pytest.raises(Stopped):
        world.push(vm(disk), report=stop_when_done)
    assert world.proxy.count("PUT", "/manifests/") == 0
    assert list(world.work.iterdir()) == []
    assert find_servers(disk) == []


def test_a_container_disk_is_read_by_skopeo_and_holds_the_disk(
    world: World, disk: Path, tmp_path: Path
) -> None:
    source = vm(disk, architecture=Architecture.ARM64)
    digest = world.push(source, format=PushFormat.CONTAINER_DISK)
    name = f"docker://{world.registry.host}/{world.repository}:1"
    inspected = world.skopeo("inspect", "--tls-verify=false", name)
    said = json.loads(inspected.stdout)
    assert (said["Architecture"], said["Os"], said["Digest"]) == ("arm64", "linux", digest)
    copied = world.skopeo("copy", "--src-tls-verify=false", name, f"dir:{tmp_path / 'copy'}")
    assert copied.returncode == 0, copied.stderr
    manifest = json.loads((tmp_path / "copy/manifest.json").read_text())
    config = json.loads((tmp_path / "copy" / manifest["config"]["digest"][7:]).read_text())
    packed = (tmp_path / "copy" / manifest["layers"][0]["digest"][7:]).read_bytes()
    content = gzip.decompress(packed)
    assert config["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(content).hexdigest()}"]
    layer = tmp_path / "layer.tar"
    layer.write_bytes(content)
    with tarfile.open(layer, "r:") as tar:
        folder, file = tar.getmembers()
        assert (folder.name, folder.isdir()) == ("disk", True)
        assert (file.name, file.isreg()) == ("disk/disk.qcow2", True)
        assert (file.uid, file.gid, file.mode) == (107, 107, 0o440)
        flat = tmp_path / "flat.qcow2"
        content_of_file = tar.extractfile(file)
        assert content_of_file is not None
        flat.write_bytes(content_of_file.read())
    qemu_img("check", "-f", "qcow2", flat)
    qemu_img("convert", "-f", "qcow2", "-O", "raw", flat, tmp_path / "content")
    assert (tmp_path / "content").read_bytes() == (disk.parent / "raw").read_bytes()
    # And pushed again, it is the same image.
    assert world.push(source, format=PushFormat.CONTAINER_DISK) == digest


def test_skopeo_reads_a_lume_image_as_the_artifact_it_is(
    world: World, disk: Path, tmp_path: Path
) -> None:
    # Plain `skopeo inspect` refuses whatever has no image config, which Lume's format has not.
    world.push(vm(disk))
    name = f"docker://{world.registry.host}/{world.repository}:1"
    raw = world.skopeo("inspect", "--tls-verify=false", "--raw", name)
    assert json.loads(raw.stdout) == world.get_manifest()
    config = world.skopeo("inspect", "--tls-verify=false", "--config", "--raw", name)
    assert json.loads(config.stdout)["os"] == "linux"
    copied = world.skopeo("copy", "--src-tls-verify=false", name, f"dir:{tmp_path / 'copy'}")
    assert copied.returncode == 0, copied.stderr


def test_a_disk_that_cannot_be_read_fails_by_its_place(
    world: World, disk: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "base.qcow2"
    damaged.write_bytes((disk.parent / "base.qcow2").read_bytes())
    os.truncate(damaged, damaged.stat().st_size - 6 * MIB)
    with pytest.raises(ToolFailed, match=r"cannot be read at byte \d+"):
        world.push(vm(damaged))
    assert list(world.work.iterdir()) == []
    damaged.write_bytes(b"no disk")
    with pytest.raises(ToolFailed, match="not in qcow2 format"):
        world.push(vm(damaged))


def test_too_little_space_for_slices_is_said_before_anything_is_sent(
    world: World, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.work.mkdir()
    real = os.statvfs(world.work)
    full = os.statvfs_result([*real[:4], 10 * MIB // real.f_frsize, *real[5:10]])
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    with pytest.raises(NoSpace, match="compress the image"):
        world.push(vm(disk))
    assert world.proxy.uploaded == 0


def test_chunks_too_small_for_a_manifest_are_refused_before_anything_is_sent(
    world: World, tmp_path: Path
) -> None:
    large = tmp_path / "large.qcow2"
    qemu_img("create", "-f", "qcow2", large, "200G")
    with pytest.raises(InvalidField, match="more than a manifest can list"):
        world.push(vm(large), chunk_bytes=16 * MIB)
    with pytest.raises(InvalidField, match="whole number of MB"):
        world.push(vm(large), chunk_bytes=1_000_000)
    assert world.proxy.requests == []
