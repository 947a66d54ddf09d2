"""Logs: the event first, facts as fields: `machine started vm=web pid=4711 accel=tcg`."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

from lumed.errors import InvalidField

_FILE_BYTES = 2_000_000
_BARE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-/:+@%,[]")


class EventLog:
    """A logger whose methods take an event and its facts. Secrets are never facts."""

    def __init__(self, area: str) -> None:
        self._logger = logging.getLogger(f"lumed.{area}")

    def debug(self, event: str, **facts: object) -> None:
        """Details for developers, such as an argv."""
        self._write(logging.DEBUG, event, facts)

    def info(self, event: str, **facts: object) -> None:
        """Something happened as it should."""
        self._write(logging.INFO, event, facts)

    def warning(self, event: str, **facts: object) -> None:
        """Something was not as it should be, and work went on."""
        self._write(logging.WARNING, event, facts)

    def error(self, event: str, **facts: object) -> None:
        """Something failed."""
        self._write(logging.ERROR, event, facts)

    def exception(self, event: str, error: BaseException, **facts: object) -> None:
        """A fault of lumed itself, with its traceback."""
        self._logger.error(_format(event, facts), exc_info=error)

    def _write(self, level: int, event: str, facts: dict[str, object]) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, _format(event, facts))


def _format(event: str, facts: dict[str, object]) -> str:
    return " ".join([event, *(f"{key}={_quote(str(value))}" for key, value in facts.items())])


def _quote(text: str) -> str:
    # A name or a guest's word must not be able to forge a second log line.
    return text if text and _BARE.issuperset(text) else ascii(text)


class _Formatter(logging.Formatter):
    """One line a record; a traceback is indented, so that no word in it can pass for a line."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        # What another handler's formatter has made of the traceback is kept here.
        record.exc_text = None
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """See logging.Formatter."""
        # Our own events are quoted already; libraries log what they like.
        record.message = " ".join(record.message.splitlines())
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """See logging.Formatter."""
        return "\n".join(f"    {line}" for line in super().formatException(ei).splitlines())


class _PrivateFileHandler(RotatingFileHandler):
    """Files that only this user can read, also those that follow the first."""

    def _open(self) -> TextIO:  # type: ignore[override]  # typeshed is too narrow
        return open(self.baseFilename, "a", encoding="utf-8", opener=_open_private)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


@contextlib.contextmanager
def start_logging(directory: Path, level: str) -> Iterator[None]:
    """Log to `lumed.log` (all) and `lumed.error.log` (warnings and worse), and warnings to stderr.

    5 files of 2 MB each, mode 0600. `GET /lume/logs` reads these files. level is for our own
    events; of libraries (uvicorn, asyncio) only warnings are kept.
    Raises InvalidField if there is no such level.
    """
    if level.upper() not in logging.getLevelNamesMapping():
        reason = f"{level!r:.60} is no level; use debug, info, warning or error"
        raise InvalidField(f"LUME_LOG_LEVEL: {reason}", fields={"LUME_LOG_LEVEL": reason})
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    formatter = _Formatter("[%(asctime)s] %(levelname)s: %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    everything = _PrivateFileHandler(directory / "lumed.log", maxBytes=_FILE_BYTES, backupCount=4)
    warnings: list[logging.Handler] = [
        _PrivateFileHandler(directory / "lumed.error.log", maxBytes=_FILE_BYTES, backupCount=4),
        logging.StreamHandler(sys.stderr),
    ]
    root, own = logging.getLogger(), logging.getLogger("lumed")
    before = own.level
    own.setLevel(level.upper())
    for handler in warnings:
        handler.setLevel(logging.WARNING)
    handlers = [everything, *warnings]
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
    # What it has to say is in the errors that it raises.
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        own.setLevel(before)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
