"""Blocking work beside the event loop, without leaving it alone when the caller gives up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class _GivenUp(Exception):
    """Nobody waits for this work any more, and it had not begun."""


class Stopped(Exception):
    """Work in a thread was told to stop, and has."""


def in_loop(function: Callable[P, object]) -> Callable[P, None]:
    """What a thread may call to have `function` called in the event loop that runs now."""
    loop = asyncio.get_running_loop()

    def call(*arguments: P.args, **options: P.kwargs) -> None:
        loop.call_soon_threadsafe(partial(function, *arguments, **options))

    return call


async def run_to_end(
    work: Callable[[], T],
    *,
    on_cancel: Callable[[], object] | None = None,
    undo: Callable[[T], object] | None = None,
    executor: Executor | None = None,
) -> T:
    """Run `work` in a thread; a cancellation calls on_cancel and waits until the thread ended.

    asyncio.to_thread lets a cancelled thread run on, and it would then write into a directory
    that its caller is already removing. Work that takes long must watch what on_cancel sets.
    undo gets what a cancelled `work` still returned, such as a lock or a process.
    executor is for work of minutes; the default one is for what a request waits for.
    """
    begun = given_up = False

    def run() -> T:
        nonlocal begun
        begun = True
        if given_up:
            raise _GivenUp
        return work()

    future = asyncio.get_running_loop().run_in_executor(executor, run)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        if on_cancel is not None:
            on_cancel()
        given_up = True
        if not begun:
            # Still queued behind other work: whoever takes it up sees that it is given up.
            future.cancel()
            raise
        while not future.done():
            # Further cancellations change nothing: we are ending already.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({future})
        # The exception is seen, so that asyncio does not report it as forgotten.
        if future.exception() is None and undo is not None:
            undo(future.result())
        raise
