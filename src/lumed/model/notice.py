"""What somebody who watches is told."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from lumed.model.operation import Operation
from lumed.model.view import VmView


class NoticeKind(StrEnum):
    """The words of the API's events. `reset`: what came before is not known here, list anew."""

    RESET = "reset"
    VM = "vm"
    VM_DELETED = "vm-deleted"
    OPERATION = "operation"


class ResetReason(StrEnum):
    """Why a watcher must list anew: a first visit, another server run, or too far behind."""

    START = "start"
    RESTARTED = "restarted"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Notice:
    """One event: vm for the kinds of VMs, as it is or last was, operation for its kind.

    id is "<server run>-<number>"; whoever returns with it is told what came after.
    """

    id: str
    kind: NoticeKind
    vm: VmView | None = None
    operation: Operation | None = None
    reason: ResetReason | None = None

    def concerns(self, name: str) -> bool:
        """Whether it is about the VM of that name."""
        target = self.vm.name if self.vm else self.operation.target if self.operation else name
        return target == name
