"""Logs: one line for each event, whatever its facts say."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lumed.errors import InvalidField
from lumed.log import EventLog, start_logging

LINE = re.compile(r"\[\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\] [A-Z]+: .*")
FORGED = "x\n[2026-11-24T12:00:00Z] INFO: vm deleted vm=web"


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[Path]:
    """The folder of the logs, which are started."""
    with start_logging(tmp_path / "logs", "info"):
        yield tmp_path / "logs"


def test_an_event_is_a_line_with_its_facts(logs: Path) -> None:
    EventLog("test").info("machine started", vm="web", pid=4711, why="two words", none=None)
    (line,) = (logs / "lumed.log").read_text().splitlines()
    assert LINE.fullmatch(line)
    assert line.endswith("] INFO: machine started vm=web pid=4711 why='two words' none=None")


def test_warnings_stand_in_both_logs_and_details_in_none(logs: Path) -> None:
    log = EventLog("test")
    log.debug("detail")
    log.warning("odd")
    log.error("bad")
    assert (logs / "lumed.log").read_text().count("\n") == 2
    assert (logs / "lumed.error.log").read_text() == (logs / "lumed.log").read_text()


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\x0b", "\x1b[2K", "\u2028", "\x85", "\0"])
def test_a_fact_cannot_forge_a_line(logs: Path, end: str) -> None:
    EventLog("test").info("vm seen", vm=FORGED.replace("\n", end), **{"ä": "ü"})
    text = (logs / "lumed.log").read_text()
    assert len(text.splitlines()) == 1
    assert text.count("\n") == 1
    assert end not in text.removesuffix("\n")
    assert "ü" not in text


def test_a_traceback_cannot_forge_a_line(logs: Path) -> None:
    try:
        raise ValueError(FORGED)
    except ValueError as error:
        EventLog("test").exception("request failed", error, path=FORGED)
    lines = (logs / "lumed.error.log").read_text().splitlines()
    assert [line for line in lines if LINE.fullmatch(line)] == lines[:1]
    assert "    Traceback (most recent call last):" in lines
    assert "    ValueError: x" in lines


def test_logs_are_private_and_bounded(logs: Path) -> None:
    log = EventLog("test")
    for _ in range(25):
        log.info("long", words="x" * 1_000_000)
    files = sorted(path.name for path in logs.iterdir())
    assert files == ["lumed.error.log", "lumed.log", *(f"lumed.log.{n}" for n in range(1, 5))]
    assert all(path.stat().st_size < 2_100_000 for path in logs.iterdir())
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in logs.iterdir())


def test_libraries_are_heard_when_they_warn(logs: Path) -> None:
    library = logging.getLogger("uvicorn.error")
    library.info("started")
    library.warning("odd %s", FORGED)
    (line,) = (logs / "lumed.error.log").read_text().splitlines()
    assert line.endswith("WARNING: odd x [2026-11-24T12:00:00Z] INFO: vm deleted vm=web")


def test_an_unknown_level_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match="'loud' is no level"), start_logging(tmp_path, "loud"):
        pass
