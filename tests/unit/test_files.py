"""Writing files so that a power cut leaves the old content or the new."""

import os
from pathlib import Path

import pytest

from lumed.errors import NoSpace
from lumed.files import check_free_space, full_disk_is_no_space, write_atomic


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        write_atomic(path, b"one")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_too_little_space_names_place_need_and_rest(tmp_path: Path) -> None:
    check_free_space(tmp_path, 1, "create web")
    with pytest.raises(NoSpace) as caught:
        check_free_space(tmp_path, 1 << 60, "create web", where="ssd")
    assert caught.value.message.startswith(
        "Not enough space in ssd to create web: needs 1048576.0 TB, has "
    )
    assert caught.value.fields["neededBytes"] == 1 << 60


def test_a_full_disk_is_no_space_and_other_errors_stay(tmp_path: Path) -> None:
    def write_to_full_device() -> None:
        with full_disk_is_no_space(tmp_path, "write"), Path("/dev/full").open("wb", 0) as file:
            file.write(b"x")

    with pytest.raises(NoSpace, match=f"Not enough space in {tmp_path} to write"):
        write_to_full_device()
    with pytest.raises(FileNotFoundError), full_disk_is_no_space(tmp_path, "write"):
        os.stat(tmp_path / "missing")  # noqa: PTH116
