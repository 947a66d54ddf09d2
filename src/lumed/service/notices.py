"""The latest notices, numbered, and who waits for more of them.

Nobody has a queue: everyone reads the same notices from a place of their own, so a slow reader
costs no memory. One who falls behind what is kept is told to list anew.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass

from lumed.model.notice import Notice, NoticeKind, ResetReason
from lumed.model.operation import Operation
from lumed.model.view import VmView

KEPT = 1000
_PROGRESS_EVERY_S = 0.2
# Python refuses to read a number of many thousands.
_DIGITS = 20


class Notices:
    """Numbered notices of this server run. Lives in the event loop; waits for nothing itself."""

    def __init__(self, kept: int = KEPT) -> None:
        self._run = secrets.token_hex(4)
        self._size = kept
        self._kept: dict[int, Notice] = {}
        self._last = 0
        # Whoever has not read this one has lost some.
        self._lost = 0
        self._news = asyncio.Event()
        self._progress: dict[str, _Progress] = {}

    def tell_vm(self, view: VmView, *, deleted: bool = False) -> None:
        """A VM is otherwise than it was, or gone."""
        self._publish(NoticeKind.VM_DELETED if deleted else NoticeKind.VM, vm=view)

    def tell_operation(self, operation: Operation) -> None:
        """An operation began, went on or is over; how it goes on is told 5 times a second."""
        progress = self._progress.get(operation.id)
        if operation.is_over or progress is None:
            if progress is not None:
                progress.cancel()
                del self._progress[operation.id]
            number = self._publish(NoticeKind.OPERATION, operation=operation)
            if not operation.is_over:
                self._progress[operation.id] = _Progress(operation, number, _now())
            return
        progress.latest = operation
        if progress.timer is None:
            wait_s = max(0.0, progress.told_at + _PROGRESS_EVERY_S - _now())
            loop = asyncio.get_running_loop()
            progress.timer = loop.call_later(wait_s, self._tell_progress, progress)

    def _tell_progress(self, progress: _Progress) -> None:
        progress.timer = None
        if progress.number != progress.first:
            # Only the latest is of use to one who comes later; an hour's pull would else push
            # everything out.
            self._kept.pop(progress.number, None)
        progress.number = self._publish(NoticeKind.OPERATION, operation=progress.latest)
        progress.told_at = _now()

    def _publish(
        self, kind: NoticeKind, *, vm: VmView | None = None, operation: Operation | None = None
    ) -> int:
        self._last += 1
        self._kept[self._last] = Notice(self._id(self._last), kind, vm, operation)
        if len(self._kept) > self._size:
            self._lost = next(iter(self._kept))
            del self._kept[self._lost]
        news, self._news = self._news, asyncio.Event()
        news.set()
        return self._last

    def subscribe(self, after: str | None, vm: str | None) -> Subscription:
        """Read from the notice with that id on, or from now; only what concerns vm, if given."""
        if after is None:
            return Subscription(self, vm, self._last, ResetReason.START)
        run, _, number = after.rpartition("-")
        is_ours = run == self._run and number.isdecimal() and len(number) < _DIGITS
        if not is_ours or int(number) > self._last:
            return Subscription(self, vm, self._last, ResetReason.RESTARTED)
        return Subscription(self, vm, int(number), None)

    def read(self, after: int) -> tuple[list[Notice], int] | None:
        """What came after that number, and the last number; None if some of it is not kept."""
        if after < self._lost:
            return None
        found: list[Notice] = []
        for number in reversed(self._kept):
            if number <= after:
                break
            found.append(self._kept[number])
        found.reverse()
        return found, self._last

    @property
    def news(self) -> asyncio.Event:
        """Set by the next notice."""
        return self._news

    def make_reset(self, reason: ResetReason) -> Notice:
        """The notice for one who must list anew; what is told from now on comes after it."""
        return Notice(self._id(self._last), NoticeKind.RESET, reason=reason)

    @property
    def last(self) -> int:
        """The number of the latest notice."""
        return self._last

    def _id(self, number: int) -> str:
        return f"{self._run}-{number}"


@dataclass(slots=True)
class _Progress:
    """What was told of an operation that runs, and what waits to be."""

    latest: Operation
    number: int
    told_at: float
    first: int = 0
    timer: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        self.first = self.number

    def cancel(self) -> None:
        if self.timer is not None:
            self.timer.cancel()


class Subscription:
    """One reader of the notices."""

    def __init__(
        self, notices: Notices, vm: str | None, after: int, reset: ResetReason | None
    ) -> None:
        self._notices = notices
        self._vm = vm
        self._after = after
        self._reset = reset

    async def wait(self, timeout_s: float) -> list[Notice]:
        """The next notices, at once if there are any; none if nothing came for that long."""
        try:
            async with asyncio.timeout(timeout_s):
                while not (found := self._read()):
                    await self._notices.news.wait()
        except TimeoutError:
            return []
        return found

    def _read(self) -> list[Notice]:
        if self._reset is None:
            notices = self._notices.read(self._after)
            if notices is not None:
                found, self._after = notices
                return found if self._vm is None else [n for n in found if n.concerns(self._vm)]
            self._reset = ResetReason.LOST
        reason, self._reset = self._reset, None
        self._after = self._notices.last
        return [self._notices.make_reset(reason)]


def _now() -> float:
    return asyncio.get_running_loop().time()
