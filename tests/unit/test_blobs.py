"""Blobs that come in pieces: cut lines, killed pulls, two pulls at once, wrong bytes."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lumed.errors import NoSpace, RegistryFailed
from lumed.images.blobs import get_blob_path
from lumed.images.formats.plan import ImagePlan
from lumed.images.formats.recognise import plan_image
from lumed.images.oci import ConnectionLost
from lumed.images.pull import BLOBS_AT_ONCE, drop_blobs, needed_bytes, pull_disk
from lumed.threads import Stopped
from tests.doubles.blob_source import MemoryBlobs
from tests.unit.test_pull import gzip_pack, lume_image, make_disk, pull

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def blobs() -> MemoryBlobs:
    return MemoryBlobs(piece_bytes=2000)


@pytest.fixture
def disk() -> bytes:
    return make_disk(3, seed=7)


@pytest.fixture
def plan(blobs: MemoryBlobs, disk: bytes) -> ImagePlan:
    return plan_image(lume_image(blobs, disk), b"{}")


def test_a_cut_line_goes_on_where_it_was_cut(
    blobs: MemoryBlobs, disk: bytes, plan: ImagePlan, tmp_path: Path
) -> None:
    first = plan.parts[0].blob
    blobs.cuts[first.digest] = [0, 1, 5000, 5000, 9001, first.size_bytes]
    assert pull(blobs, plan, tmp_path) == disk
    assert blobs.sent_bytes == sum(blob.size_bytes for blob in plan.blobs)
    asked = [offset for digest, offset in blobs.requests if digest == first.digest]
    assert asked == [0, 0, 1, 5000, 5000, 9001]


def test_a_line_that_brings_nothing_any_more_is_given_up(
    blobs: MemoryBlobs, plan: ImagePlan, tmp_path: Path
) -> None:
    first = plan.parts[0].blob
    blobs.cuts[first.digest] = [3000] * 100
    with pytest.raises(ConnectionLost):
        pull(blobs, plan, tmp_path)
    assert len([digest for digest, _ in blobs.requests if digest == first.digest]) == 5
    assert get_blob_path(tmp_path, first).stat().st_size == 3000


def test_a_server_without_ranges_is_read_over(
    blobs: MemoryBlobs, disk: bytes, plan: ImagePlan, tmp_path: Path
) -> None:
    blobs.ignore_range = True
    blobs.cuts[plan.parts[0].blob.digest] = [5000]
    assert pull(blobs, plan, tmp_path) == disk


def test_more_or_fewer_bytes_than_the_blob_has_are_an_error(
    blobs: MemoryBlobs, plan: ImagePlan, tmp_path: Path
) -> None:
    digest = plan.parts[0].blob.digest
    whole = blobs.blobs[digest]
    blobs.blobs[digest] = whole + b"x"
    with pytest.raises(RegistryFailed, match="more than"):
        pull(blobs, plan, tmp_path)
    drop_blobs(plan, tmp_path)
    blobs.blobs[digest] = whole[:-1]
    with pytest.raises(RegistryFailed, match="of the blob"):
        pull(blobs, plan, tmp_path)


@pytest.mark.parametrize("kept", ["part", "all", "too much"])
def test_what_was_found_and_is_wrong_is_fetched_again(
    kept: str, blobs: MemoryBlobs, disk: bytes, plan: ImagePlan, tmp_path: Path
) -> None:
    first = plan.parts[0].blob
    length = {"part": 4000, "all": first.size_bytes, "too much": first.size_bytes + 1}[kept]
    path = get_blob_path(tmp_path, first)
    path.parent.mkdir()
    # Well packed content of a wrong kind: had it been unpacked, the disk would show it.
    wrong = gzip_pack(random.Random(5).randbytes(2 * first.size_bytes))[:length]  # noqa: S311
    path.write_bytes(wrong)
    assert pull(blobs, plan, tmp_path) == disk
    assert (first.digest, 0) in blobs.requests


def test_what_was_found_and_is_right_is_not_fetched_again(
    blobs: MemoryBlobs, disk: bytes, plan: ImagePlan, tmp_path: Path
) -> None:
    assert pull(blobs, plan, tmp_path) == disk
    blobs.requests.clear()
    assert needed_bytes(plan, tmp_path) == sum(blob.size_bytes for blob in plan.blobs)
    assert pull(blobs, plan, tmp_path) == disk
    assert not blobs.requests


def test_fresh_bytes_that_are_wrong_are_not_kept(
    blobs: MemoryBlobs, plan: ImagePlan, tmp_path: Path
) -> None:
    first = plan.parts[0].blob
    blobs.blobs[first.digest] = b"x" * first.size_bytes
    with pytest.raises(RegistryFailed, match=first.digest):
        pull(blobs, plan, tmp_path)
    assert get_blob_path(tmp_path, first).stat().st_size == 0


def test_two_pulls_at_once_fetch_each_blob_once(
    blobs: MemoryBlobs, disk: bytes, plan: ImagePlan, tmp_path: Path
) -> None:
    stop = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(
                partial(pull_disk, stop=stop, report=lambda done, total: None),
                blobs,
                plan,
                tmp_path,
                tmp_path / f"disk{number}",
            )
            for number in range(2)
        ]
        for job in jobs:
            job.result()
    assert [(tmp_path / f"disk{number}").read_bytes() for number in range(2)] == [disk, disk]
    assert blobs.sent_bytes == sum(blob.size_bytes for blob in plan.blobs)


def test_a_blob_that_another_pull_uses_is_left(
    blobs: MemoryBlobs, disk: bytes, plan: ImagePlan, tmp_path: Path
) -> None:
    seen: list[bool] = []

    def drop() -> None:
        drop_blobs(plan, tmp_path)
        path = get_blob_path(tmp_path, plan.parts[0].blob)
        seen.append(path.exists())

    blobs.on_read = drop
    single = ImagePlan(plan.format, plan.os, plan.parts[:1], disk_bytes=plan.parts[0].size_bytes)
    assert pull(blobs, single, tmp_path) == disk[: len(disk) // 3]
    assert seen
    assert all(seen)
    drop_blobs(plan, tmp_path)
    assert not list((tmp_path / "sha256").iterdir())


def test_a_stop_ends_a_pull_and_keeps_what_came(
    blobs: MemoryBlobs, disk: bytes, plan: ImagePlan, tmp_path: Path
) -> None:
    stop = threading.Event()
    blobs.on_read = lambda: stop.set() if blobs.sent_bytes > 20_000 else None
    with pytest.raises(Stopped):
        pull_disk(blobs, plan, tmp_path, tmp_path / "x", stop=stop, report=lambda done, total: None)
    assert not [thread for thread in threading.enumerate() if thread.name == "fetch"]
    blobs.on_read = lambda: None
    assert pull(blobs, plan, tmp_path) == disk
    assert blobs.sent_bytes == sum(blob.size_bytes for blob in plan.blobs)


def test_too_little_space_is_told_before_the_first_byte(
    blobs: MemoryBlobs, plan: ImagePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(tmp_path)
    needed = needed_bytes(plan, tmp_path)

    def statvfs(path: object) -> Any:
        return os.statvfs_result((1, 1, 0, 0, needed - 1, *tuple(real)[5:]))

    monkeypatch.setattr(os, "statvfs", statvfs)
    with pytest.raises(NoSpace, match="pull the image"):
        pull(blobs, plan, tmp_path)
    assert not blobs.requests


def test_a_disk_too_large_for_the_file_system_is_told(
    blobs: MemoryBlobs, plan: ImagePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ftruncate(fd: int, size: int) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(os, "ftruncate", ftruncate)
    with pytest.raises(NoSpace, match="cannot hold a file"):
        pull(blobs, plan, tmp_path)
    assert not blobs.requests


def test_progress_counts_blobs_to_their_end(
    blobs: MemoryBlobs, plan: ImagePlan, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    stop = threading.Event()
    report = lambda done, total: seen.append((done, total))  # noqa: E731
    pull_disk(blobs, plan, tmp_path, tmp_path / "x", stop=stop, report=report)
    total = sum(blob.size_bytes for blob in plan.blobs)
    assert seen[-1] == (total, total)
    assert all(done <= whole == total for done, whole in seen)


# Pulls as a process of its own, one that ends itself after so many bytes were sent.
_KILLED = """
import os, signal, sys
from pathlib import Path
from tests.unit.test_blobs import make_blobs
from tests.unit.test_pull import pull
blobs, disk, plan = make_blobs()
until = int(sys.argv[2])
sent = os.open(sys.argv[1] + "/sent", os.O_WRONLY | os.O_CREAT)
def count():
    os.pwrite(sent, b"%020d" % blobs.sent_bytes, 0)
    if blobs.sent_bytes >= until:
        os.kill(os.getpid(), signal.SIGKILL)
blobs.on_read = count
pull(blobs, plan, Path(sys.argv[1]))
"""


def make_blobs() -> tuple[MemoryBlobs, bytes, ImagePlan]:
    """The same three for the killed process and for the test."""
    blobs, disk = MemoryBlobs(piece_bytes=2000), make_disk(3, seed=11)
    return blobs, disk, plan_image(lume_image(blobs, disk), b"{}")


def test_a_killed_pull_is_resumed_and_fetches_no_byte_twice(tmp_path: Path) -> None:
    blobs, disk, plan = make_blobs()
    total = sum(blob.size_bytes for blob in plan.blobs)
    chance = random.Random(3)  # noqa: S311
    sent = kills = 0
    for _ in range(3):
        until = chance.randrange(1, (total - sent) // 2)
        done = subprocess.run(
            [sys.executable, "-c", _KILLED, str(tmp_path), str(until)],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": f"{REPOSITORY / 'src'}:{REPOSITORY}"},
            timeout=60,
        )
        assert done.returncode == -signal.SIGKILL
        kills += 1
        sent += int((tmp_path / "sent").read_text())
    assert pull(blobs, plan, tmp_path) == disk
    # At each kill, one piece for each blob under way was sent and not yet written.
    assert total <= sent + blobs.sent_bytes <= total + kills * BLOBS_AT_ONCE * blobs.piece_bytes
