"""VMs that are being made: their names are taken, and they can be seen, from acceptance on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, replace

from lumed.engine import Accepted
from lumed.errors import AlreadyExists, NotFound, PullFailed, WrongState
from lumed.model.operation import Operation, OperationStatus
from lumed.model.view import VmView
from lumed.model.vm import VmState
from lumed.service.gate import Gate
from lumed.service.operations import Operations, RunningOperation
from lumed.store.index import VmIndex

_MAKING = ("create", "pull", "clone")


@dataclass(slots=True)
class Pending:
    """A VM that is being made, as it is seen until it is there."""

    view: VmView
    operation_id: str


# What is to be done once the name is taken: the checks, then the VM as it is seen, and the work.
Work = Callable[[RunningOperation], Awaitable[None]]
Prepare = Callable[[], Awaitable[tuple[VmView, Work]]]


class Making:
    """Takes names, runs what makes their VMs, and remembers why it failed."""

    def __init__(
        self,
        index: VmIndex,
        gate: Gate,
        operations: Operations,
        on_change: Callable[[str], None],
    ) -> None:
        """on_change is told the name of a VM that shows, shows more, or shows no longer."""
        self._index = index
        self._gate = gate
        self._operations = operations
        self._on_change = on_change
        self._pending: dict[str, Pending] = {}

    def __len__(self) -> int:
        return len(self._pending)

    async def begin(self, action: str, name: str, prepare: Prepare) -> Accepted:
        """Make a VM in an operation. Raises AlreadyExists, and what prepare does."""
        exists = AlreadyExists(f"Virtual machine already exists with name: {name}")
        if self._gate.action(name) is not None:
            raise exists
        self._gate.enter(name, action, name)
        try:
            if await asyncio.to_thread(self._index.find, name) is not None:
                raise exists
            view, work = await prepare()

            def on_over() -> None:
                self._pending.pop(name, None)
                self._gate.leave(name)
                self._on_change(name)

            operation = await self._operations.start(action, name, work, on_over=on_over)
        except BaseException:
            self._gate.leave(name)
            raise
        pending = Pending(replace(view, operation=operation.id), operation.id)
        self._pending[name] = pending
        self._on_change(name)
        return Accepted(self._view(pending), operation)

    def change(self, name: str, view: VmView) -> None:
        """Show more of a VM that is being made: what its image says."""
        if (pending := self._pending.get(name)) is not None:
            pending.view = replace(view, operation=pending.operation_id)
            self._on_change(name)

    def list_views(self, location_name: str | None) -> list[VmView]:
        """The VMs being made, of one location or of all."""
        views = map(self._view, self._pending.values())
        return [view for view in views if location_name in (None, view.location_name)]

    def find_view(self, name: str, location_name: str | None) -> VmView | None:
        """A VM that is being made."""
        pending = self._pending.get(name)
        if pending is None or location_name not in (None, pending.view.location_name):
            return None
        return self._view(pending)

    def _view(self, pending: Pending) -> VmView:
        if pending.view.state is not VmState.PULLING:
            return pending.view
        operation = self._operations.get(pending.operation_id)
        done, total = operation.bytes_done or 0, operation.bytes_total or 0
        progress = round(100 * done / total, 1) if total else 0.0
        return replace(pending.view, download_progress=progress)

    async def cancel(self, name: str, actions: Collection[str] = _MAKING) -> bool:
        """End the making of a VM, and wait for that; False if none is under way."""
        pending = self._pending.get(name)
        if pending is None or self._gate.action(name) not in actions:
            return False
        with contextlib.suppress(WrongState):
            await self._operations.cancel(pending.operation_id)
        return True

    async def dismiss_failure(self, name: str) -> bool:
        """Forget that the pull of a VM failed; False if none has."""
        failed = self._find_failed_pull(name)
        if failed is not None:
            await self._operations.dismiss(failed.id)
        return failed is not None

    def check_pulled(self, name: str) -> None:
        """Raise PullFailed if the VM should have come by a pull that failed (contract, 5)."""
        failed = self._find_failed_pull(name)
        if failed is not None and failed.error is not None:
            raise PullFailed(
                f"Pull failed for '{name}': {failed.error.message}",
                hint=failed.error.hint,
                fields={"operation": failed.id, "reason": failed.error.code},
            )

    def explain_absence(self, name: str, error: NotFound) -> NotFound:
        """The reason of a failed making, where a person looks for the VM first."""
        last = self._operations.find_last(name, _MAKING)
        if error.hint is not None or last is None or last.error is None or last.dismissed:
            return error
        return NotFound(
            error.message,
            hint=f"its {_NOUNS[last.action]} failed: {last.error.message} (operation {last.id})",
            fields={"operation": last.id},
        )

    def _find_failed_pull(self, name: str) -> Operation | None:
        last = self._operations.find_last(name, _MAKING)
        failed = (OperationStatus.FAILED, OperationStatus.INTERRUPTED)
        if last is None or last.action != "pull" or last.dismissed or last.status not in failed:
            return None
        return last


_NOUNS = {"create": "creation", "pull": "pull", "clone": "cloning"}
