"""How a machine ended."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class EndCause(StrEnum):
    """Why a machine is no longer there."""

    STOPPED = "stopped"
    """It was asked to stop."""
    GUEST = "guest-shutdown"
    """The guest powered itself off."""
    CRASHED = "crashed"
    """QEMU ended by itself: a fault, or it was killed."""
    FAILED_START = "failed-start"
    """It never came up."""
    UNKNOWN = "unknown"
    """It ended while no server was watching, and left no word."""


@dataclass(frozen=True, slots=True)
class MachineEnd:
    """The end of a machine; detail is a sentence for people, at is UTC (RFC 3339)."""

    cause: EndCause
    detail: str
    at: str
    step: str | None = None

    @property
    def is_failure(self) -> bool:
        """Whether the VM shows as crashed."""
        return self.cause in (EndCause.CRASHED, EndCause.FAILED_START)
