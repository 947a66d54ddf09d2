"""Logs: the event first, facts as fields: `machine started vm=web pid=4711 accel=tcg`."""

from __future__ import annotations

import logging
import os
import sys
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

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
    """A traceback is indented, so that no word in it can pass for a line of its own."""

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        """See logging.Formatter."""
        return "\n".join(f"    {line}" for line in super().formatException(ei).splitlines())


class _PrivateFileHandler(RotatingFileHandler):
    """Files that only this user can read, also those that follow the first."""

    def _open(self) -> TextIO:  # type: ignore[override]  # typeshed is too narrow
        return open(self.baseFilename, "a", encoding="utf-8", opener=_open_private)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def start_logging(directory: Path, level: str) -> None:
    """Log to `lumed.log` (all) and `lumed.error.log` (warnings and worse), and warnings to stderr.

    5 files of 2 MB each, mode 0600. `GET /lume/logs` reads these files.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    formatter = _Formatter("[%(asctime)s] %(levelname)s: %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    handlers: list[logging.Handler] = []
    for name, threshold in (("lumed.log", logging.DEBUG), ("lumed.error.log", logging.WARNING)):
        handlers.append(_PrivateFileHandler(directory / name, maxBytes=2_000_000, backupCount=4))
        handlers[-1].setLevel(threshold)
    handlers.append(logging.StreamHandler(sys.stderr))
    handlers[-1].setLevel(logging.WARNING)
    for handler in handlers:
        handler.setFormatter(formatter)
    for logger in map(logging.getLogger, ("lumed", "asyncio", "uvicorn")):
        logger.propagate = False
        for handler in handlers:
            logger.addHandler(handler)
    logging.getLogger("lumed").setLevel(level.upper())
    # What it has to say is in the errors that it raises.
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
