"""The file that a server's token is in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lumed.errors import InvalidField
from lumed.http.token import find_token, make_token, read_token


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "token"


def write(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_a_new_token_is_long_private_and_another_each_time(path: Path) -> None:
    write(path, b"old\n", 0o644)
    tokens = {make_token(path) for _ in range(20)}
    assert len(tokens) == 20
    assert all(len(token) >= 40 for token in tokens)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_token(path) in tokens
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"word", b"word\n", b" word \r\n\n"])
def test_white_space_around_a_token_is_not_part_of_it(path: Path, content: bytes) -> None:
    assert read_token(write(path, content)) == "word"


def test_a_file_that_is_not_there_is_no_token_and_its_name_is_told(path: Path) -> None:
    assert find_token(path) is None
    with pytest.raises(InvalidField, match=f"{path} cannot be used: No such file"):
        read_token(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602, 0o777])
def test_a_file_that_others_can_read_or_change_is_refused(path: Path, mode: int) -> None:
    write(path, b"word\n", mode)
    with pytest.raises(InvalidField, match=f"mode {mode:04o}") as refused:
        find_token(path)
    assert refused.value.hint == f"chmod 600 {path}"
    assert "word" not in str(refused.value)


@pytest.mark.parametrize(
    "content",
    [b"two words\n", b"two\nlines\n", "schlüssel".encode(), b"nul\0", b"x" * 5000],
    ids=["words", "lines", "umlaut", "nul", "long"],
)
def test_what_no_header_can_carry_is_refused(path: Path, content: bytes) -> None:
    with pytest.raises(InvalidField, match="one word of ASCII"):
        read_token(write(path, content))


@pytest.mark.parametrize("content", [b"", b"\n", b"  \n\t\n"])
def test_an_empty_file_is_refused(path: Path, content: bytes) -> None:
    with pytest.raises(InvalidField, match="it is empty"):
        read_token(write(path, content))


def test_a_link_is_refused_also_one_that_leads_nowhere(path: Path, tmp_path: Path) -> None:
    path.symlink_to(write(tmp_path / "real", b"word"))
    with pytest.raises(InvalidField, match="it is a link"):
        find_token(path)
    (tmp_path / "real").unlink()
    with pytest.raises(InvalidField, match="it is a link"):
        find_token(path)


def test_a_folder_or_a_fifo_is_refused(path: Path, tmp_path: Path) -> None:
    path.mkdir(mode=0o700)
    with pytest.raises(InvalidField, match="it is no file"):
        read_token(path)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    with pytest.raises(InvalidField, match="it is no file"):
        read_token(fifo)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away is root's")
def test_a_file_of_another_user_is_refused(path: Path) -> None:
    os.chown(write(path, b"word"), 65534, 65534)
    with pytest.raises(InvalidField, match="uid 65534"):
        read_token(path)
