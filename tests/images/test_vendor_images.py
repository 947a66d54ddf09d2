"""Images by a catalog's name, from a mirror that is a real HTTP server, with faults."""

from __future__ import annotations

import asyncio
import hashlib
import http.server
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lumed.errors import InvalidField, NoSpace, RegistryFailed
from lumed.images.catalog import VendorImage, get_vendor_image, read_catalog
from lumed.images.local import ImageCache
from lumed.model.vm import Architecture, DiskFormat

FOLDER = "/cloud/bookworm/latest"
DISK = f"{FOLDER}/debian-12-generic-amd64.qcow2"
SUMS = f"{FOLDER}/SHA512SUMS"


class Mirror(http.server.ThreadingHTTPServer):
    """Files by path; what is asked for is noted, faults are set by the tests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.cut_after: list[int] = []  # for each of the next replies with a body
        self.ignore_range = False
        self.statuses: list[int] = []
        self.moved: dict[str, str] = {}
        self.disk_length: int | None = None
        self.halted = threading.Event()
        self.release = threading.Event()
        self.halt_after: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Mirror
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        mirror = self.server
        wanted = self.headers.get("Range")
        mirror.asked.append((self.path, wanted))
        self.close_connection = True
        if mirror.statuses:
            self._empty(mirror.statuses.pop(0))
        elif self.path in mirror.moved:
            self._empty(302, mirror.moved[self.path])
        elif self.path not in mirror.files:
            self._empty(404)
        else:
            self._send(mirror.files[self.path], wanted)

    def _empty(self, status: int, location: str | None = None) -> None:
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, body: bytes, wanted: str | None) -> None:
        mirror = self.server
        start = 0
        if wanted and not mirror.ignore_range:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                self._empty(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        told = mirror.disk_length if self.path == DISK else None
        self.send_header("Content-Length", str(told or len(body) - start))
        self.end_headers()
        end = len(body)
        if mirror.cut_after and self.path == DISK:
            end = start + mirror.cut_after.pop(0)
        if mirror.halt_after is not None and self.path == DISK:
            self.wfile.write(body[start : mirror.halt_after])
            mirror.halted.set()
            mirror.release.wait(30)
            return
        self.wfile.write(body[start:end])


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A qcow2 image with 3 MiB that are not zero."""
    folder = tmp_path_factory.mktemp("disk")
    raw, image = folder / "raw", folder / "image"
    raw.write_bytes(os.urandom(3 << 20))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image], check=True)
    return image.read_bytes()


@pytest.fixture
def mirror(disk: bytes) -> Iterator[Mirror]:
    server = Mirror()
    server.files[DISK] = disk
    server.files[SUMS] = f"{hashlib.sha512(disk).hexdigest()}  {Path(DISK).name}\n".encode()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path) -> ImageCache:
    return ImageCache(tmp_path / "cache/images", {})


def debian(mirror: Mirror) -> VendorImage:
    catalog = read_catalog(mirrors={"debian": f"{mirror.url}/cloud"})
    return catalog.get("debian", Architecture.AMD64)


def leftovers(cache: ImageCache) -> list[Path]:
    """Partial files and images in the making."""
    places = (cache.blobs, cache.blobs.parent / "images/.staging")
    return [path for place in places for path in place.rglob("*") if path.is_file()]


def wait_for_bytes(cache: ImageCache, count: int) -> None:
    """Wait until a partial file has that many bytes."""
    give_up_at = time.monotonic() + 20
    while max((file.stat().st_size for file in leftovers(cache)), default=0) < count:
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def ranges(mirror: Mirror) -> list[str | None]:
    return [wanted for path, wanted in mirror.asked if path == DISK]


async def fetch(cache: ImageCache, mirror: Mirror) -> bytes:
    image = await get_vendor_image(cache, debian(mirror), lambda *_: None)
    return image.disk.read_bytes()


async def test_an_image_is_fetched_once_and_then_found_by_its_name(
    cache: ImageCache, mirror: Mirror, disk: bytes
) -> None:
    seen: list[tuple[str, int, int]] = []
    image = await get_vendor_image(cache, debian(mirror), lambda *step: seen.append(step))
    assert image.disk.read_bytes() == disk
    assert image.facts.format is DiskFormat.QCOW2
    assert image.name == "debian:12"
    assert seen[-1] == ("downloading", len(disk), len(disk))
    assert leftovers(cache) == []
    asked = len(mirror.asked)
    again = await get_vendor_image(cache, debian(mirror), lambda *_: None)
    assert again.id == image.id
    assert len(mirror.asked) == asked


async def test_two_at_once_fetch_it_once(cache: ImageCache, mirror: Mirror) -> None:
    first, second = await asyncio.gather(fetch(cache, mirror), fetch(cache, mirror))
    assert first == second
    assert len(ranges(mirror)) == 1


async def test_a_cut_line_is_gone_on_with_where_it_broke(
    cache: ImageCache, mirror: Mirror, disk: bytes
) -> None:
    mirror.cut_after = [1_000_000, 7, 500_000]
    assert await fetch(cache, mirror) == disk
    assert ranges(mirror) == [None, "bytes=1000000-", "bytes=1000007-", "bytes=1500007-"]


async def test_a_server_without_range_is_read_from_the_start(
    cache: ImageCache, mirror: Mirror, disk: bytes
) -> None:
    mirror.cut_after = [1_000_000]
    mirror.ignore_range = True
    assert await fetch(cache, mirror) == disk


async def test_a_cancelled_download_is_gone_on_with_by_the_next(
    cache: ImageCache, mirror: Mirror, disk: bytes
) -> None:
    mirror.halt_after = 2_000_000
    task = asyncio.create_task(fetch(cache, mirror))
    assert await asyncio.to_thread(mirror.halted.wait, 10)
    # What was sent may still be on its way into the file.
    await asyncio.to_thread(wait_for_bytes, cache, 1_000_000)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    mirror.halt_after = None
    # As after a kill: another server, that knows nothing but the folder.
    again = ImageCache(cache.blobs.parent / "images", {})
    assert await fetch(again, mirror) == disk
    first, second = ranges(mirror)
    assert first is None
    # All of it but a chunk that was not whole.
    assert second is not None
    assert 1_000_000 <= int(second.removeprefix("bytes=").removesuffix("-")) <= 2_000_000


@pytest.mark.parametrize("damage", ["in the middle", "too long", "whole and right"])
async def test_found_bytes_are_believed_only_after_they_were_hashed(
    cache: ImageCache, mirror: Mirror, disk: bytes, damage: str
) -> None:
    content = {
        "in the middle": disk[:1000] + b"x" + disk[1001:2_000_000],
        "too long": disk + b"x",
        "whole and right": disk,
    }[damage]
    partial = cache.blobs / "sha512" / hashlib.sha512(disk).hexdigest()
    partial.parent.mkdir(parents=True)
    partial.write_bytes(content)
    assert await fetch(cache, mirror) == disk
    if damage == "whole and right":
        assert ranges(mirror) == []


async def test_wrong_bytes_are_refused_and_leave_nothing(
    cache: ImageCache, mirror: Mirror, disk: bytes
) -> None:
    mirror.files[DISK] = disk[:-1] + bytes([disk[-1] ^ 1])
    with pytest.raises(RegistryFailed, match="does not have the sha512 sum"):
        await fetch(cache, mirror)
    assert leftovers(cache) == []
    assert cache.list_images() == []
    mirror.files[DISK] = disk
    assert await fetch(cache, mirror) == disk


async def test_without_a_list_of_sums_nothing_is_fetched(cache: ImageCache, mirror: Mirror) -> None:
    del mirror.files[SUMS]
    with pytest.raises(RegistryFailed, match="SHA512SUMS does not exist"):
        await fetch(cache, mirror)
    mirror.files[SUMS] = b"0" * 128 + b"  debian-12-other.qcow2\n"
    with pytest.raises(RegistryFailed, match="does not name debian-12-generic-amd64"):
        await fetch(cache, mirror)
    assert ranges(mirror) == []


async def test_a_missing_image_is_told_with_its_url(cache: ImageCache, mirror: Mirror) -> None:
    del mirror.files[DISK]
    with pytest.raises(RegistryFailed, match=f"{DISK} does not exist"):
        await fetch(cache, mirror)


async def test_a_busy_mirror_is_asked_again(cache: ImageCache, mirror: Mirror, disk: bytes) -> None:
    mirror.statuses = [503, 429]
    assert await fetch(cache, mirror) == disk


async def test_a_mirror_that_stays_broken_ends_the_fetch(cache: ImageCache, mirror: Mirror) -> None:
    mirror.statuses = [500] * 20
    with pytest.raises(RegistryFailed, match="status 500"):
        await fetch(cache, mirror)
    assert len(mirror.asked) < 10


async def test_redirects_are_followed_but_not_round_and_round(
    cache: ImageCache, mirror: Mirror, disk: bytes
) -> None:
    mirror.moved[DISK] = DISK
    with pytest.raises(RegistryFailed, match="redirects more than"):
        await fetch(cache, mirror)
    mirror.files["/elsewhere/disk"] = disk
    mirror.moved[DISK] = "/elsewhere/disk"
    assert await fetch(cache, mirror) == disk


async def test_an_image_that_is_too_large_is_refused_before_its_first_byte(
    cache: ImageCache, mirror: Mirror
) -> None:
    mirror.disk_length = 1 << 60
    with pytest.raises(NoSpace, match="fetch the image"):
        await fetch(cache, mirror)
    assert sum(path.stat().st_size for path in leftovers(cache)) == 0


async def test_a_right_sum_makes_no_disk_of_something_else(
    cache: ImageCache, mirror: Mirror
) -> None:
    page = b"<html>" + bytes(100)
    mirror.files[DISK] = page
    mirror.files[SUMS] = f"{hashlib.sha512(page).hexdigest()}  {Path(DISK).name}\n".encode()
    with pytest.raises(InvalidField):
        await fetch(cache, mirror)
    assert leftovers(cache) == []
    assert cache.list_images() == []
