"""How a long action goes, while it goes; Ctrl-C ends it."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from lumed.cli.output import clean, say
from lumed.errors import LumedError

if TYPE_CHECKING:
    from lumed.client.client import Client
    from lumed.client.models import Operation


def follow(client: Client, operation_id: str) -> Operation:
    """Show an operation until it is over. Raises what it failed with.

    Ctrl-C cancels it, waits until it is undone, and goes on up.
    """
    gc.enable()
    with _bar() as update:
        try:
            for operation in client.follow_operation(operation_id):
                update(operation)
            return operation
        except KeyboardInterrupt:
            say("lume: cancelling")
            # It may have been over already.
            with contextlib.suppress(LumedError):
                client.cancel_operation(operation_id)
            raise


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[Operation], None]]:
    if not sys.stderr.isatty():
        yield lambda operation: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True)]
    if console.width >= 80:
        columns += [TransferSpeedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None)

        def update(operation: Operation) -> None:
            what = f"{operation.action} {operation.target}: {operation.stage}"
            progress.update(
                task,
                description=escape(clean(what)),
                completed=operation.bytes_done or 0,
                total=operation.bytes_total,
            )

        yield update
