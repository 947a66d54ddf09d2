"""The Python client of the API: one method a verb, over TCP or the server's unix socket.

    with Client() as client:
        vm = client.create_vm("web", image="debian:12")
        for operation in client.follow_operation(vm.operation):
            print(operation.stage, operation.bytes_done)
        client.run_vm("web")
        print(client.wait_vm("web", "ip").ip_address)

`AsyncClient` (in `lumed.client.async_client`) is the same with `async with`, `await` and
`async for`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Generic, Literal, ParamSpec, Self, TypeVar, overload

from lumed.client import calls
from lumed.client.calls import Call, describe, plan_events, plan_follow
from lumed.client.connection import check_outcome, choose_target, read_reply, say_ended
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
from lumed.client.wire import Wire
from lumed.errors import TimedOut

if TYPE_CHECKING:
    from http.client import HTTPResponse

P = ParamSpec("P")
T = TypeVar("T")

_PIECE_BYTES = 64 << 10


class _Verb(Generic[P, T]):
    """A call as a method of Client."""

    def __init__(self, plan: Callable[P, Call[T]]) -> None:
        self._plan = plan
        self.__doc__ = plan.__doc__

    @overload
    def __get__(self, client: None, owner: type) -> Self: ...
    @overload
    def __get__(self, client: Client, owner: type) -> Callable[P, T]: ...
    def __get__(self, client: Client | None, owner: type) -> Self | Callable[P, T]:
        if client is None:
            return self

        def carry_out(*args: P.args, **kwargs: P.kwargs) -> T:
            return client.carry_out(self._plan(*args, **kwargs))

        return describe(carry_out, self._plan)


class Client:
    """A client that blocks; safe to use from several threads. Close it, or use `with`.

    Without arguments it speaks to the server of this home over its unix socket.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        socket: str | Path | None = None,
        home: str | Path | None = None,
        token: str | None = None,
        ca: str | Path | None = None,
    ) -> None:
        """Nothing is connected yet.

        url: such as "http://localhost:7777"; token: what a server on the network asks for;
        ca: a file of certificates (PEM) to trust instead of the system's.
        socket, home: a unix socket, or the home whose server is meant (else LUME_HOME, ~/.lume).
        """
        self._target = choose_target(url, socket, home, token, ca)
        self._wire = Wire(self._target)

    list_vms = _Verb(calls.list_vms)
    get_vm = _Verb(calls.get_vm)
    create_vm = _Verb(calls.create_vm)
    clone_vm = _Verb(calls.clone_vm)
    update_vm = _Verb(calls.update_vm)
    run_vm = _Verb(calls.run_vm)
    stop_vm = _Verb(calls.stop_vm)
    delete_vm = _Verb(calls.delete_vm)
    screenshot = _Verb(calls.screenshot)
    vm_logs = _Verb(calls.vm_logs)
    pull_vm = _Verb(calls.pull_vm)
    cancel_pull = _Verb(calls.cancel_pull)
    push_vm = _Verb(calls.push_vm)
    build_image = _Verb(calls.build_image)
    list_images = _Verb(calls.list_images)
    delete_image = _Verb(calls.delete_image)
    prune_images = _Verb(calls.prune_images)
    list_operations = _Verb(calls.list_operations)
    get_operation = _Verb(calls.get_operation)
    cancel_operation = _Verb(calls.cancel_operation)
    host_status = _Verb(calls.host_status)
    server_logs = _Verb(calls.server_logs)
    get_config = _Verb(calls.get_config)
    change_config = _Verb(calls.change_config)
    list_locations = _Verb(calls.list_locations)
    add_location = _Verb(calls.add_location)
    remove_location = _Verb(calls.remove_location)
    set_default_location = _Verb(calls.set_default_location)

    def carry_out(self, call: Call[T], *, key: str | None = None) -> T:
        """Send a call of `lumed.client.calls` and read its answer; the methods above do this.

        key: an Idempotency-Key; a write that is sent again with it within 24 h, for instance
        after OutcomeUnknown, is not done again.
        """
        return read_reply(call, *self._wire.request(call, key))

    def follow_operation(self, id: str) -> Iterator[Operation]:
        """How an operation is, now and twice a second, until it is over.

        Raises what it failed with, after the last one was given out.
        """
        operation = self.get_operation(id)
        while True:
            yield operation
            if operation.is_over:
                check_outcome(operation)
                return
            operation = self.get_operation(id, PROGRESS_EVERY_S)

    def finish_operation(self, id: str, timeout_s: float | None = None) -> Operation:
        """Wait until an operation is over. Raises what it failed with, TimedOut."""
        deadline = Deadline(timeout_s)
        while not (operation := self.get_operation(id, deadline.turn_s())).is_over:
            deadline.check(f"The {operation.action} of {operation.target} was not over")
        return check_outcome(operation)

    def wait_vm(self, name: str, goal: Goal, timeout_s: float = 300) -> Vm:
        """Wait until a VM is "stopped", "running", or answers: by "ip", "ssh", or its "agent".

        Raises NotFound, TimedOut, MachineFailed if it went down instead.
        """
        deadline = Deadline(timeout_s)
        while not check_goal(vm := self.get_vm(name), goal):
            if deadline.is_over:
                raise not_reached(vm, goal, timeout_s)
            silence_s = min(deadline.left_s, LOOK_AGAIN_S)
            with contextlib.suppress(TimedOut, ServerUnreachable):
                for event in self._listen(plan_events(name, None), silence_s):
                    # What was missed between the look and the stream is told by none.
                    vm = self.get_vm(name) if event.vm is None else event.vm
                    if check_goal(vm, goal):
                        return vm
                    if deadline.is_over:
                        break
        return vm

    def events(self, *, vm: str | None = None, resume: str | None = None) -> Iterator[Event]:
        """What changes from now on, or since the event whose id is `resume`; without end.

        vm: of that VM only. Raises ServerUnreachable when the server ends: look, then resume.
        """
        return self._listen(plan_events(vm, resume), SILENCE_S)

    def follow_vm_logs(
        self, name: str, *, type: Literal["serial", "qemu"] = "serial", lines: int | None = None
    ) -> Iterator[bytes]:
        """What a VM printed and prints from now on, over its runs too; until it is deleted.

        It may hold any bytes: never show it to a terminal as it is.
        """
        return self._follow(plan_follow(calls.vm_logs(name, lines=lines), type))

    def follow_server_logs(
        self, type: Literal["info", "error"] = "info", lines: int | None = None
    ) -> Iterator[bytes]:
        """The server's own log, and what it says from now on."""
        return self._follow(plan_follow(calls.server_logs(lines=lines), type))

    def close(self) -> None:
        """Close the connections."""
        self._wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _listen(self, call: Call[None], silence_s: float) -> Iterator[Event]:
        reader = EventReader()
        for piece in self._follow(call, silence_s):
            yield from reader.feed(piece)
        raise say_ended(self._target)

    def _follow(self, call: Call[None], silence_s: float | None = None) -> Iterator[bytes]:
        with self._stream(call, silence_s) as reply:
            while piece := reply.read1(_PIECE_BYTES):
                yield piece

    @contextlib.contextmanager
    def _stream(self, call: Call[None], silence_s: float | None) -> Iterator[HTTPResponse]:
        with self._wire.stream(call, silence_s) as reply:
            if reply.status >= 300:
                read_reply(call, reply.status, reply.read())
            yield reply
