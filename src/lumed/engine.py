"""The verbs, as the routes see them.

`service/` implements them on this host; another implementation could pass them on to a cluster,
so nothing here is tied to one machine. Every method raises LumedError subclasses only.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lumed.model.answer import Answer
from lumed.model.host import HostStatus, MachineUsage
from lumed.model.image import ImageView, Pruned
from lumed.model.notice import Notice
from lumed.model.operation import Operation
from lumed.model.request import (
    BuildRequest,
    CloneRequest,
    CreateRequest,
    PullRequest,
    PushRequest,
    RunRequest,
    SettingsChange,
    UpdateRequest,
)
from lumed.model.view import VmView
from lumed.settings import Settings


@dataclass(frozen=True, slots=True)
class Accepted:
    """A long action that has begun."""

    vm: VmView
    operation: Operation


class Watch(Protocol):
    """One watcher's place in what is told."""

    async def wait(self, timeout_s: float) -> Sequence[Notice]:
        """The next notices, at once if there are any; none if nothing came for that long.

        A RESET among them: what came before is not known any more (the watcher is new, comes
        from another server run, or reads too slowly). Who lists all VMs and operations after
        it, and goes on with what follows, misses nothing.
        """


class KeyedRequest(Protocol):
    """A request that came with a key. answer is the one that it had before, if it had one.

    was_cut_off: it came before, and a server ended before it was answered. Setting kept has an
    answer kept.
    """

    answer: Answer | None
    was_cut_off: bool
    kept: Answer | None


class Engine(Protocol):
    """Everything the API can do."""

    async def list_vms(self, storage: str | None = None) -> list[VmView]:
        """All VMs, or those of one location; in every state, sorted by name."""

    async def get_vm(self, name: str, storage: str | None = None) -> VmView:
        """One VM. Raises NotFound."""

    async def create_vm(self, request: CreateRequest) -> Accepted:
        """Begin to make a VM; what can be checked is checked before this returns."""

    async def clone_vm(self, request: CloneRequest) -> VmView:
        """Make a VM from a stopped one, independent of it; wait until it is there.

        Raises NotFound, AlreadyExists, WrongState while the source runs, Busy, NoSpace.
        """

    async def update_vm(self, name: str, request: UpdateRequest) -> VmView:
        """Change a stopped VM. Raises WrongState while it runs, InvalidField on a shrink."""

    async def run_vm(self, name: str, request: RunRequest) -> Accepted:
        """Begin to start a VM; what can be checked is checked before this returns."""

    async def stop_vm(
        self, name: str, storage: str | None = None, *, force: bool = False
    ) -> VmView:
        """Stop a VM and wait until it is off; last_end.step says what ended it."""

    async def take_screenshot(self, name: str, storage: str | None = None) -> bytes:
        """The screen of a running VM as PNG. Raises WrongState if it does not run."""

    async def delete_vm(self, name: str, storage: str | None = None) -> None:
        """Delete a VM; one that runs or is being made is stopped first."""

    async def pull_vm(self, request: PullRequest) -> Accepted:
        """Begin to fetch an image and to make a VM of it. Raises AlreadyExists."""

    async def cancel_pull(self, name: str) -> None:
        """End a pull, and wait for that; its name is free then. Raises NotFound."""

    async def push_vm(self, request: PushRequest) -> Operation:
        """Begin to send a stopped VM to a registry; its result is the manifest's digest."""

    async def build_image(self, request: BuildRequest) -> Operation:
        """Begin to build a guest image; it is in the cache under its name then."""

    async def list_images(self) -> list[ImageView]:
        """The images in the cache, by name."""

    async def delete_image(self, name: str) -> ImageView:
        """Forget a name, and its image with the last one. Raises WrongState if a VM rests on it."""

    async def prune_images(self, *, dry_run: bool) -> Pruned:
        """Remove the images that nothing rests on; dry_run only tells which."""

    def list_operations(self) -> list[Operation]:
        """The operations still known, newest first."""

    def get_operation(self, operation_id: str) -> Operation:
        """One operation. Raises NotFound."""

    async def wait_operation(self, operation_id: str, timeout_s: float) -> Operation:
        """Wait until an operation is over, or that long; how it is then. Raises NotFound."""

    async def finish_operation(self, operation_id: str) -> Operation:
        """Wait until an operation is over. Raises what it failed with, WrongState if cancelled."""

    async def cancel_operation(self, operation_id: str) -> Operation:
        """Ask an operation to stop and wait until it has. Raises WrongState if it is over."""

    def watch(self, after: str | None, vm: str | None) -> AbstractAsyncContextManager[Watch]:
        """Be told what changes: each VM, whoever changes it, and each operation.

        after is the id of the last notice that was taken in, None for a new watcher. With vm
        only what concerns the VM of that name is told. A VM's notice is what a look at it saw:
        never a state that no look could have seen, and not each that it had.
        """

    def once(self, key: str, fingerprint: str) -> AbstractAsyncContextManager[KeyedRequest]:
        """Carry out a request under a key, unless it was within 24 hours.

        fingerprint stands for all of the request. The same request that is under way is waited
        for. Raises KeyReused if the key had another one, Busy if the first takes over a minute.
        """

    async def host_status(self) -> HostStatus:
        """The host in numbers."""

    async def measure_machines(self) -> list[MachineUsage]:
        """What each running machine uses."""

    def settings(self) -> Settings:
        """The settings in force."""

    async def change_settings(self, change: SettingsChange) -> Settings:
        """Change and keep some settings; all of them or, on InvalidField, none."""

    def locations(self) -> dict[str, Path]:
        """The named storage locations."""

    async def add_location(self, name: str, path: str) -> Path:
        """Configure a location. Raises AlreadyExists."""

    async def remove_location(self, name: str) -> None:
        """Forget a location; its VMs stay on disk. Raises Conflict for the default one."""

    async def set_default_location(self, name: str) -> None:
        """Choose the location for requests without `storage`."""

    async def read_logs(self, kind: str, lines: int | None) -> dict[str, str]:
        """The server's logs: `info` and `error`, the last lines of each."""

    def follow_log(self, kind: str, lines: int | None) -> AsyncGenerator[bytes, None]:
        """One of the server's logs, `info` or `error`: its last lines, then what is written."""

    async def read_vm_logs(
        self, name: str, storage: str | None, kind: str, lines: int | None
    ) -> dict[str, str]:
        """A VM's logs of this run, `serial` and `qemu` (kind, or `all`): the last lines of each.

        1 MiB of each at most. Raises NotFound.
        """

    async def follow_vm_log(
        self, name: str, storage: str | None, kind: str, lines: int | None
    ) -> AsyncGenerator[bytes, None]:
        """One of a VM's logs: its last lines, then what is written, until the VM is deleted.

        Bytes as the guest printed them. Another run goes on in it. Raises NotFound.
        """
