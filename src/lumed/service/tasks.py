"""The owner of everything that goes on beside requests.

Not asyncio.TaskGroup: there one fault ends all tasks, and one machine's watcher must not take
the others with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from lumed.log import EventLog

_log = EventLog("tasks")


class TaskOwner:
    """Keeps tasks alive, logs their faults, and ends all of them at the end."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def create_task(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run work beside everything else."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._settle)
        return task

    def _settle(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            _log.exception("task failed", fault, task=task.get_name())

    async def close(self) -> None:
        """Cancel what still runs and wait for it."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
