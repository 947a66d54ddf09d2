"""The end of a log, and what comes after it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import pytest

from lumed.store.tail import follow, read_tail


@pytest.mark.parametrize(
    ("text", "lines", "tail"),
    [
        (b"", None, b""),
        (b"", 3, b""),
        (b"one", 1, b"one"),
        (b"one\n", 1, b"one\n"),
        (b"one\ntwo", 1, b"two"),
        (b"one\ntwo\n", 1, b"two\n"),
        (b"one\ntwo\n", 2, b"one\ntwo\n"),
        (b"one\ntwo\n", 9, b"one\ntwo\n"),
        (b"\n\n\n", 2, b"\n\n"),
        (b"a\rb\nc\xff\r\n", 1, b"c\xff\r\n"),
    ],
)
def test_the_last_lines_are_read(tmp_path: Path, text: bytes, lines: int, tail: bytes) -> None:
    log = tmp_path / "log"
    log.write_bytes(text)
    assert read_tail(log, lines) == tail


def test_a_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_tail(tmp_path / "log", None) == b""


def test_of_a_huge_log_only_the_end_is_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as file:
        # Sparse: reading all of it would take minutes.
        file.truncate(1 << 40)
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + b"line\n" * 300_000)
    assert read_tail(log, 2) == b"line\nline\n"
    tail = read_tail(log, None)
    assert len(tail) <= 1024 * 1024
    assert tail.startswith(b"line\n")
    assert len(read_tail(log, 100_000)) == 500_000


@contextlib.asynccontextmanager
async def following(path: Path, lines: int | None = None) -> AsyncIterator[AsyncGenerator[bytes]]:
    async with contextlib.aclosing(follow(path, lines)) as parts, asyncio.timeout(10):
        yield parts


async def collect(parts: AsyncGenerator[bytes, None], text: bytes) -> bytes:
    seen = b""
    while text not in seen:
        seen += await anext(parts)
    return seen


async def test_what_is_written_follows_what_is_there(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"one\ntwo\n")
    async with following(log, 1) as parts:
        assert await anext(parts) == b"two\n"
        with log.open("ab") as file:
            for number in range(3):
                file.write(b"%d" % number)
                file.flush()
                assert await anext(parts) == b"%d" % number


async def test_a_rotated_log_is_read_to_its_end_and_then_the_new_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"old\n")
    async with following(log) as parts:
        assert await anext(parts) == b"old\n"
        with log.open("ab") as file:
            file.write(b"last words\n")
        log.rename(tmp_path / "log.1")
        log.write_bytes(b"new\n")
        assert await collect(parts, b"new\n") == b"last words\nnew\n"
        log.unlink()
        log.write_bytes(b"newer, and longer than what it follows\n")
        assert await anext(parts) == b"newer, and longer than what it follows\n"
        log.write_bytes(b"cut\n")
        assert await collect(parts, b"cut\n") == b"cut\n"


async def test_a_log_is_waited_for_and_ends_with_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "vm"
    folder.mkdir()
    async with following(folder / "log", 1) as parts:
        first = asyncio.ensure_future(anext(parts))
        await asyncio.sleep(0.05)
        assert not first.done()
        (folder / "log").write_bytes(b"one\ntwo\n")
        assert await first == b"one\ntwo\n"
        folder.rename(tmp_path / "trash")
        folder.mkdir()
        (folder / "log").write_bytes(b"another VM's")
        assert [part async for part in parts] == []
    async with following(tmp_path / "trash/log") as parts:
        await anext(parts)
        shutil.rmtree(tmp_path / "trash")
        assert [part async for part in parts] == []
