"""One QMP connection with deadlines and our errors.

qemu.qmp drives the protocol. Its event listener goes silent when the connection dies, so
whoever supervises a machine watches its process as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from qemu.qmp import (
    ConnectError,
    EventListener,
    ExecInterruptedError,
    ExecuteError,
    Message,
    QMPClient,
    StateError,
)
from qemu.qmp.qmp_client import GreetingError

from lumed.errors import MachineFailed, OutcomeUnknown, TimedOut

# What lumed reacts to. The listener keeps a history, so nothing else may come in.
_EVENTS = ("SHUTDOWN", "RESET", "STOP", "RESUME", "VSERPORT_CHANGE", "BLOCK_IO_ERROR")
_QUEUE_LOOK_S = 0.5
# An event of the moment between QEMU's taking a caller and its greeting comes before the greeting:
# seen once in 16,000 starts (QEMU 7.2).
_MOST_GREETINGS = 3


class Monitor:
    """A connection to one machine's monitor."""

    def __init__(self, client: QMPClient, listener: EventListener) -> None:
        self._client = client
        self._listener = listener

    @classmethod
    async def connect(cls, path: Path, timeout_s: float | None) -> Monitor:
        """Connect and negotiate; timeout_s None waits as long as the machine is silent.

        Raises TimedOut if the machine is silent (stopped, or its monitor is taken by another
        client), MachineFailed if nobody listens any more.
        """
        try:
            async with asyncio.timeout(timeout_s):
                for _ in range(_MOST_GREETINGS - 1):
                    with contextlib.suppress(GreetingError):
                        return await cls._connect_once(path)
                return await cls._connect_once(path)
        except TimeoutError as error:
            raise TimedOut(f"QEMU's monitor was silent for {timeout_s:g} s") from error
        except (GreetingError, ConnectError, OSError) as error:
            raise MachineFailed(f"QEMU's monitor refused the connection: {error}") from error

    @classmethod
    async def _connect_once(cls, path: Path) -> Monitor:
        client = QMPClient("lumed")
        listener = EventListener(_EVENTS)
        client.register_listener(listener)
        try:
            await client.connect(await _connect(path))
        except BaseException as error:
            await _disconnect(client)
            if isinstance(error, ConnectError) and isinstance(error.exc, GreetingError):
                raise error.exc from error
            raise
        return cls(client, listener)

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float
    ) -> object:
        """Run a QMP command and return its `return` value.

        Raises MachineFailed if QEMU refuses it or is gone, TimedOut if no answer came (the
        command may still be carried out), OutcomeUnknown if the connection broke meanwhile.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.execute(command, dict(arguments or {}) or None)
        except TimeoutError as error:
            raise TimedOut(f"QEMU did not answer {command} within {timeout_s:g} s") from error
        except ExecuteError as error:
            raise MachineFailed(f"QEMU refused {command}: {error}") from error
        except ExecInterruptedError as error:
            raise OutcomeUnknown(f"QEMU went away during {command}") from error
        except StateError as error:
            raise MachineFailed(f"QEMU is gone; {command} was not sent") from error

    async def events(self) -> AsyncIterator[Message]:
        """Events from the connection's start to its end; those read before the end come first."""
        closed = asyncio.ensure_future(self._client.runstate_changed())
        try:
            while True:
                event = asyncio.ensure_future(self._listener.get())
                both: set[asyncio.Future[Any]] = {event, closed}
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                if not event.done() and self._listener.empty():
                    event.cancel()
                    return
                yield await event
        finally:
            closed.cancel()

    async def close(self) -> None:
        """Disconnect; the machine stays."""
        await _disconnect(self._client)


async def _connect(path: Path) -> socket.socket:
    """Connect, however many callers QEMU has not listened to yet; its queue holds two.

    A non-blocking connect(2) to a unix socket whose queue is full fails with EAGAIN, and nothing
    tells when there is room. asyncio takes that for a connection under way, and then for one.
    """
    caller = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        caller.setblocking(False)
        while True:
            try:
                caller.connect(os.fspath(path))
            except BlockingIOError:
                await asyncio.sleep(_QUEUE_LOOK_S)
            else:
                return caller
    except BaseException:
        caller.close()
        raise


async def _disconnect(client: QMPClient) -> None:
    # disconnect() raises what broke the connection in the first place, which is known by then.
    with contextlib.suppress(Exception):
        async with asyncio.timeout(1):
            await client.disconnect()
