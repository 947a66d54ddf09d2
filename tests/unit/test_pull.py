"""From blobs to a disk: every format, resumed pulls, and registries that lie."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import random
import struct
import tarfile
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zstandard

import lumed.images.pull
from lumed.errors import NoSpace, NotPossibleHere, RegistryFailed
from lumed.images.decode import BadData, open_decoder
from lumed.images.formats.plan import ImagePlan
from lumed.images.formats.recognise import find_config, plan_image
from lumed.images.oci import Descriptor, Manifest, digest_of
from lumed.images.pull import drop_blobs, pull_disk
from lumed.model.vm import Display, GuestOs
from tests.doubles import apple_lz4
from tests.doubles.blob_source import MemoryBlobs

LUME_DISK = "application/vnd.trycua.lume.disk.v1"
LUME_CONFIG = "application/vnd.trycua.lume.config.v1+json"
SLICE = 256 << 10

gzip_pack = partial(gzip.compress, mtime=0)


def make_disk(slices: int, seed: int = 1) -> bytes:
    """A disk of slices of SLICE bytes: data, holes, blocks with one byte; the second is empty."""
    chance = random.Random(seed)  # noqa: S311 - the same disk each time
    disk = bytearray(slices * SLICE)
    for _ in range(slices * 6):
        at = chance.randrange(len(disk))
        if at // SLICE != 1:
            piece = chance.randbytes(chance.choice((1, 700, 4096, 20_000)))
            disk[at : at + len(piece)] = piece[: len(disk) - at]
    if slices > 1:
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


def lume_image(blobs: MemoryBlobs, disk: bytes, pack: Any = gzip_pack) -> Manifest:
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
    [gzip_pack, zstandard.compress, bytes],
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


def test_wrong_bytes_are_told_even_if_they_cannot_be_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs, disk = MemoryBlobs(piece_bytes=500), make_disk(1)
    plan = plan_image(lume_image(blobs, disk), b"{}")
    digest = plan.parts[0].blob.digest
    blobs.blobs[digest] = blobs.blobs[digest][:10] + b"\xff" + blobs.blobs[digest][11:]
    failed = threading.Event()

    class Watched:
        def __init__(self, *arguments: Any) -> None:
            self._decoder = open_decoder(*arguments)

        def readinto(self, buffer: memoryview, /) -> int:
            try:
                return self._decoder.readinto(buffer)
            except BadData:
                failed.set()
                raise

    # The rest arrives once the unpacking has failed.
    monkeypatch.setattr(lumed.images.pull, "open_decoder", Watched)
    blobs.on_read = lambda: blobs.sent_bytes < 2000 or failed.wait(30)
    with pytest.raises(RegistryFailed, match=f"wrong bytes for the blob {digest}"):
        pull(blobs, plan, tmp_path)
    assert failed.is_set()


LZ4 = "application/octet-stream+lz4"
TAR = "application/vnd.oci.image.layer.v1.tar"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"


def retype(blob: Descriptor, media_type: str, **annotations: str) -> Descriptor:
    names = {key.replace("__", ".").replace("_", "-"): text for key, text in annotations.items()}
    return Descriptor(media_type, blob.digest, blob.size_bytes, names)


def slices_of(disk: bytes) -> list[bytes]:
    return [disk[at : at + SLICE] for at in range(0, len(disk), SLICE)]


@pytest.mark.parametrize("annotated", [True, False], ids=["sizes told", "sizes untold"])
def test_lume_legacy_parts_follow_each_other(annotated: bool, tmp_path: Path) -> None:
    blobs, disk = MemoryBlobs(), make_disk(4)[:-3000]
    layers = []
    for piece in slices_of(disk):
        notes = {
            "org__trycua__lume__uncompressed_size": str(len(piece)),
            "org__trycua__lume__uncompressed_content_digest": digest_of(piece),
        }
        layers.append(retype(blobs.add(apple_lz4.pack(piece)), LZ4, **(notes if annotated else {})))
    config = blobs.add(b'{"os": "linux", "cpuCount": 2, "memorySize": "x", "display": "800x600"}')
    layers.append(retype(config, OCI_CONFIG, org__opencontainers__image__title="config.json"))
    manifest = manifest_of(layers, org__trycua__lume__uncompressed_disk_size=str(len(disk)))
    assert find_config(manifest).digest == config.digest
    plan = plan_image(manifest, blobs.get_blob(find_config(manifest)))
    assert (plan.cpu_count, plan.memory_bytes, plan.display) == (2, None, Display(800, 600))
    assert pull(blobs, plan, tmp_path) == disk
    assert b"LUME_TEST_PATTERN" not in disk


def test_a_legacy_disk_in_one_piece_is_unpacked(tmp_path: Path) -> None:
    blobs, disk = MemoryBlobs(), make_disk(2)
    layer = retype(blobs.add(gzip_pack(disk)), "application/octet-stream+gzip")
    assert pull(blobs, plan_image(manifest_of([layer]), b"{}"), tmp_path) == disk


def test_raw_parts_with_numbers_in_their_types(tmp_path: Path) -> None:
    # The second part begins like a gzip stream, and is none.
    blobs, disk = MemoryBlobs(), bytearray(make_disk(3))
    disk[SLICE : SLICE + 3] = b"\x1f\x8b\x08"
    layers = [
        retype(blobs.add(piece), f"{TAR}{'+lzfse' if n == 2 else ''};part.number={n};part.total=3")
        for n, piece in enumerate(slices_of(bytes(disk)), start=1)
    ]
    assert pull(blobs, plan_image(manifest_of(layers[::-1]), b"{}"), tmp_path) == disk
    with pytest.raises(RegistryFailed, match="not part 2"):
        plan_image(manifest_of([layers[0], layers[2]]), b"{}")


def test_the_qemu_format_counts_from_one(tmp_path: Path) -> None:
    blobs, disk = MemoryBlobs(), make_disk(3)
    layers = [
        retype(
            blobs.add(gzip_pack(piece)),
            "application/vnd.trycua.qemu.disk.v1+gzip",
            org__trycua__qemu__part__number=str(n),
            org__trycua__qemu__part__total="3",
            org__trycua__qemu__uncompressed_size=str(len(piece)),
        )
        for n, piece in enumerate(slices_of(disk), start=1)
    ]
    told = {"guest_os": "linux", "cpu": 4, "ram_mb": 2048, "architecture": "x86_64", "display": 7}
    plan = plan_image(manifest_of(layers[::-1]), json.dumps(told).encode())
    assert (plan.architecture, plan.cpu_count, plan.memory_bytes) == ("amd64", 4, 2 << 30)
    assert plan.display is None
    assert pull(blobs, plan, tmp_path) == disk
    with pytest.raises(NotPossibleHere, match="windows"):
        plan_image(manifest_of(layers), b'{"guest_os": "windows"}')


def tart_image(blobs: MemoryBlobs, disk: bytes, **told: object) -> Manifest:
    prefix = "org__cirruslabs__tart__uncompressed_"
    layers = [
        retype(
            blobs.add(apple_lz4.pack(piece)),
            "application/vnd.cirruslabs.tart.disk.v2",
            **{f"{prefix}size": str(len(piece)), f"{prefix}content_digest": digest_of(piece)},
        )
        for piece in slices_of(disk)
    ]
    config = blobs.add(json.dumps(told).encode())
    layers.insert(0, retype(config, "application/vnd.cirruslabs.tart.config.v1"))
    return manifest_of(layers, None, **{f"{prefix}disk_size": str(len(disk))})


def test_a_tart_image_is_read(tmp_path: Path) -> None:
    blobs, disk = MemoryBlobs(), make_disk(3)
    manifest = tart_image(
        blobs,
        disk,
        os="darwin",
        arch="arm64",
        cpuCount=4,
        memorySize=8 << 30,
        display={"width": 1024, "height": 768},
    )
    plan = plan_image(manifest, blobs.get_blob(find_config(manifest)))
    assert (plan.os, plan.architecture, plan.cpu_count) == (GuestOs.MACOS, "arm64", 4)
    assert (plan.memory_bytes, plan.display) == (8 << 30, Display(1024, 768))
    assert pull(blobs, plan, tmp_path) == disk


def make_tar(*members: tuple[str, bytes] | tarfile.TarInfo, **options: Any) -> bytes:
    """A tar archive of files by path, or of members without content."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return file.getvalue()


def tar_member(name: str, kind: bytes, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def container_image(blobs: MemoryBlobs, *layers: bytes) -> Manifest:
    config = Descriptor(OCI_CONFIG, digest_of(b"{}"), 2)
    return manifest_of([retype(blobs.add(layer), TAR + "+gzip") for layer in layers], config)


CONTAINER_CONFIG = b'{"architecture": "arm64", "os": "linux"}'


@pytest.mark.parametrize("pack", [bytes, gzip_pack, zstandard.compress])
@pytest.mark.parametrize("style", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_the_file_in_disk_is_the_disk_of_a_container(pack: Any, style: int, tmp_path: Path) -> None:
    blobs, disk = MemoryBlobs(), make_disk(3)[:-512]
    other = ("etc/passwd", b"x" * 700)
    folder = tar_member("disk/", tarfile.DIRTYPE)
    layer = (
        make_tar(other, folder, (f"./disk/{'long' * 30}.img", disk), other, format=style)
        if (style != tarfile.USTAR_FORMAT)
        else make_tar(other, folder, ("disk/disk.img", disk), other, format=style)
    )
    manifest = container_image(blobs, pack(make_tar(other)), pack(layer), pack(make_tar(other)))
    plan = plan_image(manifest, CONTAINER_CONFIG)
    assert (plan.architecture, plan.os) == ("arm64", GuestOs.LINUX)
    assert pull(blobs, plan, tmp_path) == disk


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("disk/a", b"1"), ("disk/b", b"2")], "more than one file"),
        ([("etc/passwd", b"1")], "no file in disk/"),
        ([("disk/../../etc/passwd", b"1")], "path"),
        ([("/disk/a", b"1")], "path"),
        ([tar_member("disk/a", tarfile.SYMTYPE, linkname="/etc/shadow")], "no plain file"),
        ([tar_member("disk/a", tarfile.LNKTYPE, linkname="etc/shadow")], "no plain file"),
        ([tar_member("disk/a", tarfile.CHRTYPE)], "no plain file"),
        ([tar_member("disk", tarfile.SYMTYPE, linkname="/etc")], "no directory"),
        ([tar_member("disk/a", tarfile.REGTYPE, pax_headers={"size": "9" * 15})], "bytes"),
        ([tar_member("disk/a", tarfile.REGTYPE, pax_headers={"GNU.sparse.major": "1"})], "plain"),
        ([tar_member("x", tarfile.XHDTYPE, size=1 << 32)], "header of"),
    ],
)
def test_a_container_layer_that_is_not_right_is_refused(
    members: list[Any], words: str, tmp_path: Path
) -> None:
    blobs = MemoryBlobs()
    manifest = container_image(blobs, make_tar(*members, format=tarfile.PAX_FORMAT))
    with pytest.raises(RegistryFailed, match=words):
        pull(blobs, plan_image(manifest, CONTAINER_CONFIG), tmp_path)


@pytest.mark.parametrize("keep", [700, 512 + 300_000, 100])
def test_a_tar_that_is_cut_off_is_told(keep: int, tmp_path: Path) -> None:
    blobs = MemoryBlobs()
    layer = make_tar(("disk/a", make_disk(2)))[:keep]
    with pytest.raises(RegistryFailed, match="cut off"):
        pull(blobs, plan_image(container_image(blobs, layer), CONTAINER_CONFIG), tmp_path)


def test_a_wide_zstd_window_is_taken_and_an_absurd_one_is_not(tmp_path: Path) -> None:
    blobs, disk = MemoryBlobs(), make_disk(3)
    for window_log, fits in ((27, True), (28, False)):
        settings = zstandard.ZstdCompressionParameters(window_log=window_log)
        wide = zstandard.ZstdCompressor(compression_params=settings).compressobj()
        layer = retype(blobs.add(wide.compress(disk) + wide.flush()), LUME_DISK)
        plan = plan_image(manifest_of([layer]), b"{}")
        if fits:
            assert pull(blobs, plan, tmp_path) == disk
        else:
            with pytest.raises(RegistryFailed, match="memory"):
                pull(blobs, plan, tmp_path)


def test_several_frames_and_members_are_one_stream(tmp_path: Path) -> None:
    blobs, disk = MemoryBlobs(), make_disk(3)
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    checked = zstandard.ZstdCompressor(write_checksum=True).compress
    for packed in (
        skippable + checked(disk[:1000]) + checked(b"") + zstandard.compress(disk[1000:]),
        zstandard.compress(disk) + skippable,
        gzip_pack(disk[:1000]) + gzip_pack(disk[1000:]),
    ):
        layer = retype(blobs.add(packed), LUME_DISK)
        assert pull(blobs, plan_image(manifest_of([layer]), b"{}"), tmp_path) == disk


def test_an_absurd_lz4_block_is_refused(tmp_path: Path) -> None:
    blobs = MemoryBlobs()
    for packed, words in (
        (b"bv41" + struct.pack("<II", 1 << 31, 8) + bytes(8), "16 MiB"),
        (b"bv4-" + struct.pack("<I", 1 << 31), "16 MiB"),
        (b"bv41" + struct.pack("<II", 100, 8) + b"\xff" * 8, "LZ4"),
        (b"bv4?", "unknown kind"),
        (b"bv4$" + b"x", "after its end"),
    ):
        layer = retype(blobs.add(packed), LZ4)
        with pytest.raises(RegistryFailed, match=words):
            pull(blobs, plan_image(manifest_of([layer]), b"{}"), tmp_path)


@pytest.mark.parametrize("where", ["disk", "blob"])
def test_a_disk_that_runs_full_is_told(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs, write = MemoryBlobs(), os.pwrite

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        if (Path(f"/proc/self/fd/{fd}").readlink().name == "disk") == (where == "disk"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(NoSpace, match="disk" if where == "disk" else "blobs"):
        pull(blobs, plan_image(lume_image(blobs, make_disk(3)), b"{}"), tmp_path)


def test_a_disk_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs, write, disk = MemoryBlobs(), os.pwrite, make_disk(4)

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        if Path(f"/proc/self/fd/{fd}").readlink().name == "disk" and offset >= 3 * SLICE:
            raise OSError(errno.EIO, "Input/output error")
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="Input/output"):
        pull(blobs, plan_image(lume_image(blobs, disk), b"{}"), tmp_path)


def test_an_unknown_format_names_its_types() -> None:
    layer = Descriptor("application/vnd.wasm.content.layer.v1+wasm", digest_of(b""), 0)
    with pytest.raises(RegistryFailed, match=r"vnd\.wasm\.content"):
        plan_image(manifest_of([layer]), b"{}")


@pytest.mark.parametrize("pack", [gzip_pack, zstandard.compress, apple_lz4.pack])
@pytest.mark.parametrize("cut", [1, 9, 200, 20_000])
def test_a_stream_that_is_cut_off_is_told(pack: Any, cut: int, tmp_path: Path) -> None:
    blobs, disk = MemoryBlobs(), make_disk(1)
    packed = pack(disk)
    layer = retype(blobs.add(packed[:-cut]), LUME_DISK)
    with pytest.raises(RegistryFailed, match=r"damaged.*(cut off|damaged|unpacks)"):
        pull(blobs, plan_image(manifest_of([layer]), b"{}"), tmp_path)


@pytest.mark.parametrize("pack", [gzip_pack, zstandard.compress, apple_lz4.pack, bytes])
@pytest.mark.parametrize("more", [-1, 1, 5 << 20])
def test_a_part_that_is_longer_or_shorter_than_told_is_refused(
    pack: Any, more: int, tmp_path: Path
) -> None:
    blobs, disk = MemoryBlobs(), make_disk(2)
    second = disk[SLICE:] + bytes(more) if more > 0 else disk[SLICE:more]
    layers = [
        lume_layer(blobs, disk[:SLICE], pack(disk[:SLICE]), 0, 2),
        lume_layer(blobs, disk[SLICE:], pack(second), 1, 2),
    ]
    with pytest.raises(RegistryFailed, match="announced"):
        pull(blobs, plan_image(manifest_of(layers), b"{}"), tmp_path)
    assert (tmp_path / "disk").stat().st_size <= len(disk)


@pytest.mark.parametrize("pack", [gzip_pack, apple_lz4.pack, bytes])
def test_content_that_is_not_what_was_told_is_refused(pack: Any, tmp_path: Path) -> None:
    blobs, disk = MemoryBlobs(), make_disk(1)
    layer = lume_layer(blobs, disk, pack(disk[::-1]), 0, 1)
    with pytest.raises(RegistryFailed, match="content"):
        pull(blobs, plan_image(manifest_of([layer]), b"{}"), tmp_path)


def test_a_blob_in_several_parts_is_fetched_once(tmp_path: Path) -> None:
    blobs = MemoryBlobs()
    disk = make_disk(1) + bytes(3 * SLICE) + make_disk(1)
    plan = plan_image(lume_image(blobs, disk), b"{}")
    assert pull(blobs, plan, tmp_path) == disk
    assert len(blobs.requests) == len(set(blobs.requests)) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda notes: notes.pop("org.trycua.lume.part.number"), "not part 1"),
        (lambda notes: notes.update({"org.trycua.lume.part.number": "0"}), "not part 1"),
        (lambda notes: notes.update({"org.trycua.lume.part.total": "4"}), "not part 3"),
        (lambda notes: notes.update({"org.trycua.lume.part.number": "one"}), "a number"),
        (lambda notes: notes.update({"org.trycua.lume.part.offset": str(2 * SLICE)}), "ends"),
        (
            lambda notes: notes.update({"org.trycua.lume.content.uncompressed-size": "1" * 18}),
            "64 TB",
        ),
        (lambda notes: notes.update({"org.trycua.lume.content.uncompressed-size": "7"}), "ends"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(change: Any, words: str) -> None:
    blobs = MemoryBlobs()
    manifest = lume_image(blobs, make_disk(3, seed=4))
    change(manifest.layers[1].annotations)
    with pytest.raises(RegistryFailed, match=words):
        plan_image(manifest, b"{}")
