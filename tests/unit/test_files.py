"""Writing files so that a power cut leaves the old content or the new."""

import os
from pathlib import Path

import pytest

from lumed.errors import NoSpace
from lumed.files import (
    check_free_space,
    expand_path,
    full_disk_is_no_space,
    read_json_object,
    write_atomic,
    write_json,
)


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


def test_a_json_object_comes_back_and_anything_else_is_a_value_error(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"name": "ü", "list": [1, None]})
    assert read_json_object(path) == {"name": "ü", "list": [1, None]}
    assert path.read_text().endswith("}\n")
    for content in (b"", b"{", b"[]", b"3", b"null", b"\xff", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(ValueError):  # noqa: PT011 - the parsers' own words
            read_json_object(path)
    with pytest.raises(FileNotFoundError):
        read_json_object(tmp_path / "missing")


def test_a_path_is_taken_as_a_person_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_path("~/x") == Path("/home/me/x")
    assert expand_path("/a b/ü") == Path("/a b/ü")
    for text, reason in (
        ("x", "absolute"),
        ("", "absolute"),
        ("./x", "absolute"),
        ("~nobody-here/x", "home that does not exist"),
        ("/a\0b", "NUL"),
    ):
        with pytest.raises(ValueError, match=reason):
            expand_path(text)
