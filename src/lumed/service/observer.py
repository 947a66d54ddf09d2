"""Who notices that a VM has changed: told by what changes it, it looks, and tells what is new.

The state of a VM is computed at each look, and so it is here: nothing is told that a look has not
seen. Before the first watcher comes nothing is done at all; once it is gone, only what this
server itself changes is looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace
from pathlib import Path

from lumed.log import EventLog
from lumed.model.operation import Operation
from lumed.model.view import VmView
from lumed.service.live import LiveMachine
from lumed.service.making import Making
from lumed.service.notices import Notices, Subscription
from lumed.service.tasks import TaskOwner
from lumed.store.index import StoredVm, VmIndex
from lumed.store.inotify import Inotify
from lumed.store.watch import CHANGES

_log = EventLog("observer")

# For what nobody tells: a machine that falls silent, a folder that another host changes.
_ROUND_S = 10.0
# A program that writes without a pause must not have us look without one.
_FOLDERS_PAUSE_S = 0.2
# More VMs than this are sooner looked at all together.
_MANY = 20


class Observer:
    """Looks at VMs that may have changed. Lives in the event loop."""

    def __init__(
        self,
        index: VmIndex,
        making: Making,
        live: dict[Path, LiveMachine],
        view: Callable[[StoredVm], VmView],
        tasks: TaskOwner,
    ) -> None:
        self._index = index
        self._making = making
        self._live = live
        self._view = view
        self._tasks = tasks
        self._notices = Notices()
        # By name, then by location, as they were told last; None before the first watcher.
        self._seen: dict[str, dict[str, VmView]] | None = None
        self._starting = asyncio.Lock()
        self._marked: set[str] = set()
        self._all_marked = False
        self._wake = asyncio.Event()
        self._watchers = 0
        self._rounds: list[asyncio.Task[None]] = []

    def mark(self, name: str) -> None:
        """The VM of that name may have changed, come or gone."""
        if self._seen is not None:
            self._marked.add(name)
            self._wake.set()

    def mark_all(self) -> None:
        """Any VM may have."""
        if self._seen is not None:
            self._all_marked = True
            self._wake.set()

    def tell_operation(self, operation: Operation) -> None:
        """An operation has changed, and its VM with it where it begins or is over."""
        if self._seen is None:
            return
        self._notices.tell_operation(operation)
        if operation.is_over or operation.stage == "starting":
            self.mark(operation.target)

    @contextlib.asynccontextmanager
    async def watch(self, after: str | None, vm: str | None) -> AsyncIterator[Subscription]:
        """See Engine.watch."""
        async with self._starting:
            if self._seen is None:
                # What a watcher lists now is not told again: it must be known before.
                self._seen = _by_name(await self._look_at_all())
                self._tasks.create_task(self._look_when_marked(), "observer")
        self._watchers += 1
        if self._watchers == 1:
            self._rounds = [
                self._tasks.create_task(self._follow_folders(), "follow folders"),
                self._tasks.create_task(self._ask_machines(), "ask machines"),
            ]
        try:
            yield self._notices.subscribe(after, vm)
        finally:
            self._watchers -= 1
            if self._watchers == 0:
                for task in self._rounds:
                    task.cancel()

    async def _look_when_marked(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._marked or self._all_marked:
                try:
                    await self._look()
                except Exception as fault:
                    # One VM's fault must not leave every watcher without news.
                    _log.exception("look failed", fault)

    async def _look(self) -> None:
        if self._all_marked:
            self._all_marked = False
            self._marked.clear()
            found = _by_name(await self._look_at_all())
            names = found.keys() | self._known.keys()
        else:
            name = self._marked.pop()
            found = _by_name(await self._look_at(name))
            names = {name}
        # What was marked meanwhile may be half old and half new here: it is looked at again.
        for name in sorted(names - self._marked):
            self._tell_changes(name, found.get(name, {}))

    def _tell_changes(self, name: str, now: dict[str, VmView]) -> None:
        before = self._known.pop(name, {})
        if now:
            self._known[name] = now
        for location, view in before.items():
            if location not in now:
                self._notices.tell_vm(view, deleted=True)
        for location, view in now.items():
            if location not in before or _essence(before[location]) != _essence(view):
                self._notices.tell_vm(view)

    @property
    def _known(self) -> dict[str, dict[str, VmView]]:
        if self._seen is None:
            raise ValueError("nobody watches yet")
        return self._seen

    async def _look_at_all(self) -> list[VmView]:
        # Taken before the look at the disk: a VM that is published meanwhile is seen there.
        pending = self._making.list_views(None)
        stored = await asyncio.to_thread(self._index.list_vms)
        return self._join(stored, pending)

    async def _look_at(self, name: str) -> list[VmView]:
        pending = self._making.find_view(name, None)
        stored = await asyncio.to_thread(self._index.find_all, name)
        return self._join(stored, () if pending is None else (pending,))

    def _join(self, stored: list[StoredVm], pending: Iterable[VmView]) -> list[VmView]:
        names = {vm.name for vm in stored}
        return [
            *map(self._view, stored),
            *(view for view in pending if view.name not in names),
        ]

    async def _follow_folders(self) -> None:
        """Take in what others do to the folders of VMs, as the kernel tells it."""
        inotify = Inotify()
        known: dict[Path, StoredVm] = {}
        try:
            while True:
                changed = await asyncio.to_thread(self._scan, inotify, known)
                if len(changed) > _MANY:
                    self.mark_all()
                for name in changed:
                    self.mark(name)
                await asyncio.sleep(_FOLDERS_PAUSE_S)
                await inotify.wait(_ROUND_S)
        finally:
            inotify.close()

    def _scan(self, inotify: Inotify, known: dict[Path, StoredVm]) -> set[str]:
        """The names of VMs whose files have changed, and a watch for each new folder."""
        inotify.read()
        for _, directory in self._index.locations.every():
            inotify.add(str(directory), CHANGES)
        changed: set[str] = set()
        # The second time for what has changed before it was watched.
        for _ in range(2):
            found = {vm.vm_dir.path: vm for vm in self._index.list_vms()}
            for path in found.keys() | known.keys():
                # The index hands out the same object while nothing has changed.
                if found.get(path) is not known.get(path):
                    changed.add(path.name)
                    inotify.add(str(path), CHANGES)
            known.clear()
            known |= found
        return changed

    async def _ask_machines(self) -> None:
        """Ask machines how they are, as every look of a client does."""
        while True:
            await asyncio.gather(*(live.check() for live in list(self._live.values())))
            await asyncio.sleep(_ROUND_S)


def _by_name(views: Iterable[VmView]) -> dict[str, dict[str, VmView]]:
    found: dict[str, dict[str, VmView]] = {}
    for view in views:
        found.setdefault(view.name, {})[view.location_name] = view
    return found


def _essence(view: VmView) -> VmView:
    """The view without what changes all the time: bytes on disk, and what operations tell."""
    return replace(view, disk_allocated_bytes=0, download_progress=None)
