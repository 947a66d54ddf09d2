"""Operations: long actions that can be watched and cancelled."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class OperationStatus(StrEnum):
    """Where an operation is. `interrupted`: the server ended first, and the work was undone."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class OperationError:
    """Why an operation failed: the same sentence, code and hint that a request would get."""

    code: str
    message: str
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Operation:
    """One long action. Times are UTC (RFC 3339); bytes are None where nothing is counted.

    result is what came of it, such as the digest of a pushed image; a dismissed failure is no
    longer told where its VM would be.
    """

    id: str
    action: str
    target: str
    status: OperationStatus
    stage: str
    started_at: str
    ended_at: str | None = None
    bytes_done: int | None = None
    bytes_total: int | None = None
    error: OperationError | None = None
    result: str | None = None
    dismissed: bool = False

    @property
    def is_over(self) -> bool:
        """Whether it will not change any more."""
        return self.status is not OperationStatus.RUNNING
