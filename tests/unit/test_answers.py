"""Requests that come again: what is kept of them, for how long, and what a kill leaves."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path

import pytest

from lumed.errors import Busy, KeyReused, NoSpace
from lumed.model.answer import Answer
from lumed.service import answers as module
from lumed.service.answers import Answers

DONE = Answer(200, b'{"vncUrl":"vnc://:secret@127.0.0.1:5900"}')


async def carry_out(answers: Answers, key: str = "k", fingerprint: str = "f") -> Answer | None:
    async with answers.once(key, fingerprint) as request:
        if request.answer is None:
            request.kept = DONE
        return request.answer


async def test_an_answer_is_kept_for_whoever_comes_next(tmp_path: Path) -> None:
    assert await carry_out(Answers(tmp_path)) is None
    assert await carry_out(Answers(tmp_path)) == DONE
    assert await carry_out(Answers(tmp_path), "another") is None
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}
    with pytest.raises(KeyReused):
        await carry_out(Answers(tmp_path), fingerprint="other")


async def test_a_key_is_no_path(tmp_path: Path) -> None:
    folder = tmp_path / "answers"
    folder.mkdir()
    await carry_out(Answers(folder), "../../etc/passwd")
    assert [path.name for path in tmp_path.iterdir()] == ["answers"]


async def test_without_an_answer_it_is_carried_out_again(tmp_path: Path) -> None:
    answers = Answers(tmp_path)
    async with answers.once("k", "f"):
        pass
    with pytest.raises(NoSpace):
        async with answers.once("k", "f"):
            raise NoSpace("full")
    assert list(tmp_path.iterdir()) == []
    async with answers.once("k", "other") as request:
        assert (request.answer, request.was_cut_off) == (None, False)


async def test_a_request_that_was_cut_off_is_known_as_such(tmp_path: Path) -> None:
    begun = asyncio.Event()

    async def begin() -> None:
        async with Answers(tmp_path).once("k", "f"):
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(begin())
    await begun.wait()
    task.cancel()
    await asyncio.wait({task})
    with pytest.raises(KeyReused):
        await carry_out(Answers(tmp_path), fingerprint="other")
    async with Answers(tmp_path).once("k", "f") as request:
        assert request.was_cut_off
    async with Answers(tmp_path).once("k", "f") as request:
        assert request.was_cut_off
        request.kept = DONE
    assert await carry_out(Answers(tmp_path)) == DONE


async def test_those_who_come_meanwhile_wait_for_the_first(tmp_path: Path) -> None:
    answers = Answers(tmp_path)
    async with answers.once("k", "f") as request:
        waiting = [asyncio.create_task(carry_out(answers)) for _ in range(5)]
        await asyncio.sleep(0)
        with pytest.raises(KeyReused):
            await carry_out(answers, fingerprint="other")
        assert await carry_out(answers, "another") is None
        request.kept = DONE
    assert await asyncio.gather(*waiting) == [DONE] * 5


async def test_one_of_them_goes_on_where_the_first_fails(tmp_path: Path) -> None:
    answers = Answers(tmp_path)
    async with answers.once("k", "f"):
        waiting = [asyncio.create_task(carry_out(answers)) for _ in range(5)]
        await asyncio.sleep(0)
    assert sorted(await asyncio.gather(*waiting), key=bool) == [None, *[DONE] * 4]


async def test_nobody_waits_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE_S", 0.05)
    answers = Answers(tmp_path)
    async with answers.once("k", "f"):
        with pytest.raises(Busy):
            await carry_out(answers)


async def test_old_answers_and_too_many_of_them_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await carry_out(Answers(tmp_path), "old")
    (old,) = tmp_path.iterdir()
    record = json.loads(old.read_text())
    old.write_text(json.dumps(record | {"at": time.time() - 25 * 3600}))
    assert await carry_out(Answers(tmp_path), "old") is None
    os.utime(old, (0, 0))
    monkeypatch.setattr(module, "KEPT", 5)
    for number in range(9):
        await carry_out(Answers(tmp_path), str(number))
    assert len(list(tmp_path.iterdir())) <= 6
    assert not old.exists()
    assert await carry_out(Answers(tmp_path), "8") == DONE


async def test_a_damaged_record_is_no_record(tmp_path: Path) -> None:
    await carry_out(Answers(tmp_path))
    (file,) = tmp_path.iterdir()
    for text in ("", "{", "[]", "{}", '{"at": "now"}'):
        file.write_text(text)
        assert await carry_out(Answers(tmp_path)) is None


async def test_an_answer_that_cannot_be_kept_is_still_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Answers(tmp_path).once("k", "f") as request:
        request.kept = DONE
        monkeypatch.setattr(module, "write_json", _fail)


def _fail(*_: object, **__: object) -> None:
    raise NoSpace("full")
