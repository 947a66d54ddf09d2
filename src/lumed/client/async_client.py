"""The Python client of the API for asyncio: what `lumed.client.client` has, to be awaited."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, ParamSpec, Self, TypeVar, overload

import httpx2

from lumed.client import calls
from lumed.client.calls import Call, describe, plan_events, plan_follow
from lumed.client.connection import (
    CONNECT_S,
    Target,
    check_outcome,
    choose_target,
    explain_failure,
    read_reply,
    say_ended,
)
from lumed.client.errors import ServerUnreachable
from lumed.client.events import Event, EventReader
from lumed.client.models import Operation, Vm
from lumed.client.waiting import (
    LOOK_AGAIN_S,
    PROGRESS_EVERY_S,
    SILENCE_S,
    Deadline,
    Goal,
    check_goal,
    not_reached,
)
from lumed.errors import LumedError, TimedOut

P = ParamSpec("P")
T = TypeVar("T")


class _AsyncVerb(Generic[P, T]):
    """A call as a method of AsyncClient."""

    def __init__(self, plan: Callable[P, Call[T]]) -> None:
        self._plan = plan
        self.__doc__ = plan.__doc__

    @overload
    def __get__(self, client: None, owner: type) -> Self: ...
    @overload
    def __get__(self, client: AsyncClient, owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(
        self, client: AsyncClient | None, owner: type
    ) -> Self | Callable[P, Coroutine[Any, Any, T]]:
        if client is None:
            return self

        async def carry_out(*args: P.args, **kwargs: P.kwargs) -> T:
            return await client.carry_out(self._plan(*args, **kwargs))

        return describe(carry_out, self._plan)


class AsyncClient:
    """Client for asyncio: the same methods, to be awaited or iterated with `async for`."""

    def __init__(
        self,
        url: str | None = None,
        *,
        socket: str | Path | None = None,
        home: str | Path | None = None,
        token: str | None = None,
        ca: str | Path | None = None,
    ) -> None:
        """See Client."""
        self._target = choose_target(url, socket, home, token, ca)
        self._http = _open_http(self._target)

    list_vms = _AsyncVerb(calls.list_vms)
    get_vm = _AsyncVerb(calls.get_vm)
    create_vm = _AsyncVerb(calls.create_vm)
    clone_vm = _AsyncVerb(calls.clone_vm)
    update_vm = _AsyncVerb(calls.update_vm)
    run_vm = _AsyncVerb(calls.run_vm)
    stop_vm = _AsyncVerb(calls.stop_vm)
    delete_vm = _AsyncVerb(calls.delete_vm)
    screenshot = _AsyncVerb(calls.screenshot)
    vm_logs = _AsyncVerb(calls.vm_logs)
    pull_vm = _AsyncVerb(calls.pull_vm)
    cancel_pull = _AsyncVerb(calls.cancel_pull)
    push_vm = _AsyncVerb(calls.push_vm)
    build_image = _AsyncVerb(calls.build_image)
    list_images = _AsyncVerb(calls.list_images)
    delete_image = _AsyncVerb(calls.delete_image)
    prune_images = _AsyncVerb(calls.prune_images)
    list_operations = _AsyncVerb(calls.list_operations)
    get_operation = _AsyncVerb(calls.get_operation)
    cancel_operation = _AsyncVerb(calls.cancel_operation)
    host_status = _AsyncVerb(calls.host_status)
    server_logs = _AsyncVerb(calls.server_logs)
    get_config = _AsyncVerb(calls.get_config)
    change_config = _AsyncVerb(calls.change_config)
    list_locations = _AsyncVerb(calls.list_locations)
    add_location = _AsyncVerb(calls.add_location)
    remove_location = _AsyncVerb(calls.remove_location)
    set_default_location = _AsyncVerb(calls.set_default_location)

    async def carry_out(self, call: Call[T], *, key: str | None = None) -> T:
        """See Client."""
        try:
            reply = await self._http.request(**_plan_request(call, key, call.timeout_s))
        except httpx2.TransportError as error:
            raise _explain(self._target, call.method, error) from error
        return read_reply(call, reply.status_code, reply.content)

    async def follow_operation(self, id: str) -> AsyncIterator[Operation]:
        """See Client."""
        operation = await self.get_operation(id)
        while True:
            yield operation
            if operation.is_over:
                check_outcome(operation)
                return
            operation = await self.get_operation(id, PROGRESS_EVERY_S)

    async def finish_operation(self, id: str, timeout_s: float | None = None) -> Operation:
        """See Client."""
        deadline = Deadline(timeout_s)
        while not (operation := await self.get_operation(id, deadline.turn_s())).is_over:
            deadline.check(f"The {operation.action} of {operation.target} was not over")
        return check_outcome(operation)

    async def wait_vm(self, name: str, goal: Goal, timeout_s: float = 300) -> Vm:
        """See Client."""
        deadline = Deadline(timeout_s)
        while not check_goal(vm := await self.get_vm(name), goal):
            if deadline.is_over:
                raise not_reached(vm, goal, timeout_s)
            silence_s = min(deadline.left_s, LOOK_AGAIN_S)
            with contextlib.suppress(TimedOut, ServerUnreachable):
                async for event in self._listen(plan_events(name, None), silence_s):
                    # What was missed between the look and the stream is told by none.
                    vm = await self.get_vm(name) if event.vm is None else event.vm
                    if check_goal(vm, goal):
                        return vm
                    if deadline.is_over:
                        break
        return vm

    def events(self, *, vm: str | None = None, resume: str | None = None) -> AsyncIterator[Event]:
        """See Client."""
        return self._listen(plan_events(vm, resume), SILENCE_S)

    def follow_vm_logs(
        self, name: str, *, type: Literal["serial", "qemu"] = "serial", lines: int | None = None
    ) -> AsyncIterator[bytes]:
        """See Client."""
        return self._follow(plan_follow(calls.vm_logs(name, lines=lines), type))

    def follow_server_logs(
        self, type: Literal["info", "error"] = "info", lines: int | None = None
    ) -> AsyncIterator[bytes]:
        """See Client."""
        return self._follow(plan_follow(calls.server_logs(lines=lines), type))

    async def close(self) -> None:
        """See Client."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _listen(self, call: Call[None], silence_s: float) -> AsyncIterator[Event]:
        reader = EventReader()
        # Closed with this one, and not at some time by the collector.
        async with contextlib.aclosing(self._follow(call, silence_s)) as pieces:
            async for piece in pieces:
                for event in reader.feed(piece):
                    yield event
        raise say_ended(self._target)

    async def _follow(
        self, call: Call[None], silence_s: float | None = None
    ) -> AsyncGenerator[bytes, None]:
        async with self._stream(call, silence_s) as reply:
            async for piece in reply.aiter_bytes():
                yield piece

    @contextlib.asynccontextmanager
    async def _stream(
        self, call: Call[None], silence_s: float | None
    ) -> AsyncIterator[httpx2.Response]:
        try:
            async with self._http.stream(**_plan_request(call, None, silence_s)) as reply:
                if not reply.is_success:
                    read_reply(call, reply.status_code, await reply.aread())
                yield reply
        except httpx2.TransportError as error:
            raise _explain(self._target, call.method, error) from error


def _open_http(target: Target) -> httpx2.AsyncClient:
    """A proxy of the environment is not for servers of this host."""
    is_tls = target.base_url.startswith("https:")
    # A context with the usual certificates takes 50 ms.
    tls = target.make_tls() if is_tls else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    uds = None if target.socket is None else str(target.socket)
    transport = httpx2.AsyncHTTPTransport(uds=uds, verify=tls)
    return httpx2.AsyncClient(base_url=target.base_url, headers=target.headers, transport=transport)


def _plan_request(call: Call[T], key: str | None, silence_s: float | None) -> dict[str, Any]:
    """The arguments for httpx2's `request` and `stream`; see Wire."""
    return {
        "method": call.method,
        "url": call.path,
        "params": call.params,
        "json": call.body,
        "headers": {"Idempotency-Key": key} if key else None,
        "timeout": httpx2.Timeout(call.timeout_s, connect=CONNECT_S, read=silence_s),
    }


def _explain(target: Target, method: str, error: httpx2.TransportError) -> LumedError:
    unconnected = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.UnsupportedProtocol)
    return explain_failure(
        target,
        method,
        error,
        is_connected=not isinstance(error, unconnected),
        is_silent=isinstance(error, httpx2.TimeoutException),
    )
