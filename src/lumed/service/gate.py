"""One named action per VM at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Hashable

from lumed.errors import Busy


class Gate:
    """Who is at work on which VM. Not for threads: it lives in the event loop."""

    def __init__(self) -> None:
        self._held: dict[Hashable, tuple[str, asyncio.Event]] = {}

    def action(self, key: Hashable) -> str | None:
        """What is under way there."""
        held = self._held.get(key)
        return held[0] if held else None

    def enter(self, key: Hashable, action: str, name: str) -> None:
        """Begin an action. Raises Busy that names the one under way."""
        if (held := self.action(key)) is not None:
            raise Busy(
                f"Virtual machine {name} is busy: {held}", fields={"action": held, "name": name}
            )
        self._held[key] = (action, asyncio.Event())

    def leave(self, key: Hashable) -> None:
        """End the action."""
        _, over = self._held.pop(key)
        over.set()

    @contextlib.asynccontextmanager
    async def wait_for(
        self, key: Hashable, action: str, name: str, *, behind: frozenset[str], timeout_s: float
    ) -> AsyncIterator[None]:
        """Begin an action once those in `behind` are over. Raises Busy for others, or too late."""
        try:
            async with asyncio.timeout(timeout_s):
                while (held := self._held.get(key)) is not None and held[0] in behind:
                    await held[1].wait()
        except TimeoutError:
            pass
        self.enter(key, action, name)
        try:
            yield
        finally:
            self.leave(key)
