"""Operations: they run here, whoever waits for them, and leave a trace on disk.

An operation belongs to the engine's task group, so a client that hangs up ends nothing. Its
file is written at start and at end; one that still says "running" when a server starts was
interrupted.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from lumed.errors import LumedError, NotFound, WrongState
from lumed.files import read_json_object, write_json
from lumed.log import EventLog
from lumed.model.operation import Operation, OperationError, OperationStatus
from lumed.naming import new_operation_id
from lumed.service.tasks import TaskOwner

_log = EventLog("operations")

KEPT = 200
KEPT_FOR = timedelta(days=7)
_CANCEL_TIMEOUT_S = 20.0


def utc_now() -> str:
    """The time as the API writes it (RFC 3339, UTC)."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class RunningOperation:
    """The handle that the work itself holds: to tell its stage and its progress."""

    def __init__(self, registry: Operations, operation: Operation) -> None:
        self._registry = registry
        self.id = operation.id

    def stage(self, stage: str) -> None:
        """Tell what is being done now."""
        self._registry.change(self.id, stage=stage)

    def report(self, stage: str, done: int, total: int) -> None:
        """Tell stage and bytes at once; a total of 0 is unknown."""
        known = (done, total) if total else (None, None)
        self._registry.change(self.id, stage=stage, bytes_done=known[0], bytes_total=known[1])

    def tell_result(self, result: str) -> None:
        """Tell what came of it."""
        self._registry.change(self.id, result=result)


class Operations:
    """All operations of this home, the running ones and the latest that are over."""

    def __init__(
        self,
        directory: Path,
        tasks: TaskOwner,
        on_change: Callable[[Operation], None] = lambda _: None,
    ) -> None:
        """on_change is told each operation that begins, goes on or is over."""
        self._directory = directory
        self._owner = tasks
        self._on_change = on_change
        self._known: dict[str, Operation] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._failures: dict[str, LumedError] = {}

    async def load(self) -> None:
        """Read what earlier servers left; what they had begun becomes "interrupted"."""
        self._known = await asyncio.to_thread(_load, self._directory)

    def list_all(self) -> list[Operation]:
        """Newest first."""
        # Of one millisecond the later ones first, too.
        latest_first = reversed(self._known.values())
        return sorted(latest_first, key=lambda op: op.started_at, reverse=True)

    def get(self, operation_id: str) -> Operation:
        """One operation. Raises NotFound."""
        try:
            return self._known[operation_id]
        except KeyError:
            raise NotFound(f"Operation not found: {operation_id}") from None

    def find_last(self, target: str, actions: Collection[str]) -> Operation | None:
        """The newest operation of one of those kinds on that VM."""
        matching = (op for op in self.list_all() if op.target == target and op.action in actions)
        return next(matching, None)

    async def dismiss(self, operation_id: str) -> None:
        """Do not tell of a failure any more; it stays in the list."""
        await self._rewrite(self.change(operation_id, dismissed=True))

    def find_running(self, target: str) -> str | None:
        """The id of the operation that runs on that VM, the newest of them.

        A VM is there a moment before the operation that made it is over.
        """
        running = (self._known[key] for key in reversed(self._tasks))
        return next((op.id for op in running if op.target == target), None)

    def get_failure(self, operation_id: str) -> LumedError:
        """What an operation failed with, as the error that it was."""
        failure = self._failures.get(operation_id)
        if failure is not None:
            return failure
        return WrongState(f"Operation {operation_id} was {self.get(operation_id).status.value}")

    def change(self, operation_id: str, **changes: Any) -> Operation:
        """Replace some facts of an operation."""
        operation = replace(self._known[operation_id], **changes)
        self._known[operation_id] = operation
        self._on_change(operation)
        return operation

    async def start(
        self,
        action: str,
        target: str,
        work: Callable[[RunningOperation], Awaitable[None]],
        *,
        on_over: Callable[[], None] = lambda: None,
    ) -> Operation:
        """Record an operation, then let its work begin.

        work raises LumedError to fail; a cancellation makes it "cancelled". on_over is called
        once it is over, also if it was cancelled before its first step.
        Raises NoSpace if not even the record can be kept; nothing has begun then.
        """
        operation = Operation(
            id=new_operation_id(),
            action=action,
            target=target,
            status=OperationStatus.RUNNING,
            stage="starting",
            started_at=utc_now(),
        )
        await self._keep(operation)
        self._known[operation.id] = operation
        handle = RunningOperation(self, operation)
        work_done = _Once(on_over)
        carried_out = self._carry_out(handle, work, work_done)
        task = self._owner.create_task(carried_out, f"{action} {target}")
        self._tasks[operation.id] = task
        self._on_change(operation)

        def settle(_: asyncio.Task[None]) -> None:
            self._tasks.pop(operation.id, None)
            # A task that is cancelled before its first step runs no line of its own.
            work_done()
            # It may have been forgotten already: 200 others can end in a moment.
            known = self._known.get(operation.id)
            if known is not None and not known.is_over:
                self.change(operation.id, **_over(OperationStatus.CANCELLED))

        task.add_done_callback(settle)
        return operation

    async def wait(self, operation_id: str, timeout_s: float | None) -> Operation:
        """Wait until an operation is over, or until timeout_s has passed; how it is then."""
        task = self._tasks.get(operation_id)
        if task is not None:
            await asyncio.wait({task}, timeout=timeout_s)
        return self.get(operation_id)

    async def cancel(self, operation_id: str) -> Operation:
        """Ask an operation to stop and wait until it has. Raises WrongState if it is over."""
        operation = self.get(operation_id)
        task = self._tasks.get(operation_id)
        if operation.is_over or task is None:
            raise WrongState(f"Operation {operation_id} is over: {operation.status.value}")
        task.cancel()
        operation = await self.wait(operation_id, _CANCEL_TIMEOUT_S)
        if operation.is_over:
            # One that had not begun has written nothing itself.
            with contextlib.suppress(OSError, LumedError):
                await self._rewrite(operation)
        return operation

    async def _carry_out(
        self,
        handle: RunningOperation,
        work: Callable[[RunningOperation], Awaitable[None]],
        work_done: Callable[[], None],
    ) -> None:
        status, error = OperationStatus.SUCCEEDED, None
        try:
            await work(handle)
        except asyncio.CancelledError:
            # A cancelled operation ends here; only the end of the server goes further up.
            status = OperationStatus.CANCELLED
        except LumedError as failure:
            status = OperationStatus.FAILED
            error = OperationError(failure.code, failure.message, failure.hint)
            self._failures[handle.id] = failure
            _log.warning("operation failed", id=handle.id, error=failure)
        except Exception as fault:
            status = OperationStatus.FAILED
            error = OperationError("internal", f"{type(fault).__name__}: {fault}")
            _log.exception("operation failed", fault, id=handle.id)
        # Whoever sees the operation over finds its VM free.
        work_done()
        operation = self.change(handle.id, error=error, **_over(status))
        # A full disk must not turn a success into a failure: the next server would only read
        # "interrupted" here.
        with contextlib.suppress(OSError, LumedError):
            await self._rewrite(operation)
            await self._forget_old()

    async def _keep(self, operation: Operation) -> None:
        # Not durable: after a power cut no operation goes on, and its name is free anyway.
        await asyncio.to_thread(
            write_json, self._file(operation.id), asdict(operation), durable=False
        )

    async def _rewrite(self, operation: Operation) -> None:
        await self._keep(operation)
        if operation.id not in self._known:
            # Another that ended meanwhile forgot it, perhaps before this file was there.
            await self._delete(operation.id)

    async def _forget_old(self) -> None:
        over = [op for op in self.list_all() if op.is_over]
        for operation in over[KEPT:]:
            # Another that ends meanwhile forgets some of them too.
            self._known.pop(operation.id, None)
            self._failures.pop(operation.id, None)
            await self._delete(operation.id)

    async def _delete(self, operation_id: str) -> None:
        await asyncio.to_thread(self._file(operation_id).unlink, missing_ok=True)

    def _file(self, operation_id: str) -> Path:
        return self._directory / f"{operation_id}.json"


class _Once:
    """Calls a function at the first call only."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function: Callable[[], None] | None = function

    def __call__(self) -> None:
        function, self._function = self._function, None
        if function is not None:
            function()


def _over(status: OperationStatus) -> dict[str, Any]:
    return {"status": status, "stage": "over", "ended_at": utc_now()}


def _load(directory: Path) -> dict[str, Operation]:
    oldest = (datetime.now(UTC) - KEPT_FOR).isoformat()
    found: list[Operation] = []
    for file in directory.glob("op-*.json"):
        try:
            data: dict[str, Any] = read_json_object(file)
            error = data["error"]
            operation = Operation(
                **{
                    **data,
                    "status": OperationStatus(data["status"]),
                    "error": None if error is None else OperationError(**error),
                }
            )
            is_old = operation.started_at < oldest
        except (OSError, ValueError, TypeError, KeyError) as reason:
            _log.warning("operation record unreadable", file=file, error=reason)
            continue
        if is_old or operation.id != file.stem:
            file.unlink(missing_ok=True)
            continue
        if not operation.is_over:
            operation = replace(
                operation,
                error=OperationError("interrupted", "The server ended before the work was done"),
                **_over(OperationStatus.INTERRUPTED),
            )
            with contextlib.suppress(OSError, LumedError):
                write_json(file, asdict(operation))
        found.append(operation)
    found.sort(key=lambda op: op.started_at)
    return {operation.id: operation for operation in found[-KEPT:]}
