"""Requests with a key of the client's are carried out once, whenever they come again.

Claim, act, record: a file is there before the request is carried out, and holds the answer before
the client has it. A claim without an answer was cut off by the end of a server. What then comes
again is carried out again: every write names what it makes or ends, so nothing can be done twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumed.errors import Busy, KeyReused, LumedError
from lumed.files import read_json_object, write_json
from lumed.log import EventLog
from lumed.model.answer import Answer

_log = EventLog("answers")

KEPT = 1000
KEPT_FOR_S = 24 * 3600.0
_SWEEP_EVERY = 100
_PATIENCE_S = 60.0


@dataclass(slots=True)
class KeyedRequest:
    """A request under way: its answer, if it had one before, or whether it was cut off.

    kept is set to have an answer kept; without one the request is forgotten.
    """

    answer: Answer | None
    was_cut_off: bool
    kept: Answer | None = None


class Answers:
    """The answers of the last 24 hours, 1,000 or a few more, one file (0600) each."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._running: dict[str, _Running] = {}
        self._claims = 0

    @contextlib.asynccontextmanager
    async def once(self, key: str, fingerprint: str) -> AsyncIterator[KeyedRequest]:
        """See Engine.once."""
        # A key may be anything, and a file's name may not.
        name = hashlib.sha256(key.encode()).hexdigest()
        await self._wait_for_first(name, fingerprint)
        running = self._running[name] = _Running(fingerprint, asyncio.Event())
        file = self._directory / f"{name}.json"
        try:
            request = await asyncio.to_thread(self._claim, file, fingerprint)
            try:
                yield request
            except Exception:
                await asyncio.to_thread(_record, file, fingerprint, request)
                raise
            # A request that is cancelled, since the server ends, leaves its claim.
            if request.answer is None:
                await asyncio.to_thread(_record, file, fingerprint, request)
        finally:
            del self._running[name]
            running.over.set()

    async def _wait_for_first(self, name: str, fingerprint: str) -> None:
        try:
            async with asyncio.timeout(_PATIENCE_S):
                while (running := self._running.get(name)) is not None:
                    _check_same(running.fingerprint, fingerprint)
                    await running.over.wait()
        except TimeoutError:
            raise Busy(
                "The request that had this Idempotency-Key first is still being carried out",
                hint="ask again with the same key, or look: GET /lume/operations",
            ) from None

    def _claim(self, file: Path, fingerprint: str) -> KeyedRequest:
        if self._claims % _SWEEP_EVERY == 0:
            _sweep(self._directory)
        self._claims += 1
        record = _read(file)
        if record is None:
            _write(file, fingerprint, None)
            return KeyedRequest(None, was_cut_off=False)
        _check_same(record.fingerprint, fingerprint)
        return KeyedRequest(record.answer, was_cut_off=record.answer is None)


@dataclass(frozen=True, slots=True)
class _Running:
    fingerprint: str
    over: asyncio.Event


@dataclass(frozen=True, slots=True)
class _Record:
    fingerprint: str
    answer: Answer | None


def _check_same(first: str, now: str) -> None:
    if first != now:
        reason = "another request had this key; use a new one for each request"
        raise KeyReused(f"Idempotency-Key: {reason}", fields={"Idempotency-Key": reason})


def _read(file: Path) -> _Record | None:
    try:
        data: dict[str, Any] = read_json_object(file)
        if data["at"] + KEPT_FOR_S < time.time():
            return None
        answer = None
        if data["status"] is not None:
            answer = Answer(int(data["status"]), str(data["body"]).encode())
        return _Record(str(data["fingerprint"]), answer)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        _log.warning("answer unreadable", file=file, error=error)
        return None


def _write(file: Path, fingerprint: str, answer: Answer | None) -> None:
    value = {
        "fingerprint": fingerprint,
        "at": time.time(),
        "status": answer and answer.status,
        "body": answer and answer.body.decode(),
    }
    # Not durable, as operations are not: what was made is there after a power cut, or is not.
    write_json(file, value, durable=False)


def _record(file: Path, fingerprint: str, request: KeyedRequest) -> None:
    try:
        if request.kept is not None:
            _write(file, fingerprint, request.kept)
        elif not request.was_cut_off:
            file.unlink(missing_ok=True)
    except (OSError, LumedError) as error:
        # The request was carried out, and its client must hear of it.
        _log.warning("answer not kept", error=error)


def _sweep(directory: Path) -> None:
    """Remove what is too old, and the oldest of too many; temporary files go the same way."""
    oldest = time.time() - KEPT_FOR_S
    with os.scandir(directory) as entries:
        files = sorted(((entry.stat().st_mtime, entry.path) for entry in entries), reverse=True)
    for number, (changed_at, path) in enumerate(files):
        if number >= KEPT or changed_at < oldest:
            Path(path).unlink(missing_ok=True)
