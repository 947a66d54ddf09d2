"""The engine of this host: which step follows which, and who may act on a VM when."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path

from lumed.engine import Accepted
from lumed.errors import (
    Busy,
    InvalidField,
    LumedError,
    NotFound,
    WrongState,
)
from lumed.images.local import ImageCache
from lumed.log import EventLog
from lumed.machine.driver import MachineDriver
from lumed.model.host import Accelerator, HostStatus, MachineUsage
from lumed.model.image import ImageView, Pruned
from lumed.model.operation import Operation, OperationStatus
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
from lumed.model.vm import Architecture, DiskFormat, VmConfig
from lumed.network.bridge import list_interfaces
from lumed.network.start import sweep_networks
from lumed.service.adopt import adopt_machines
from lumed.service.answers import Answers, KeyedRequest
from lumed.service.cloning import make_clone, request_of_clone
from lumed.service.gate import Gate
from lumed.service.host import (
    follow_log,
    follow_vm_log,
    free_bytes,
    measure_machines,
    read_logs,
    read_memory,
    read_vm_logs,
)
from lumed.service.keeper import SettingsKeeper
from lumed.service.library import Library
from lumed.service.live import LiveMachine
from lumed.service.making import Making, Work
from lumed.service.notices import Subscription
from lumed.service.observer import Observer
from lumed.service.operations import Operations, RunningOperation
from lumed.service.power import Power, RescueSystem
from lumed.service.provisioning import Provisioning
from lumed.service.sources import Sources, get_image
from lumed.service.tasks import TaskOwner
from lumed.service.transfer import Pulls, plan_push
from lumed.service.view import Views, view_of_request
from lumed.settings import Settings
from lumed.store.disk import grow
from lumed.store.index import StoredVm, VmIndex
from lumed.store.layout import Home
from lumed.store.locations import Locations
from lumed.store.staging import remove_vm, sweep
from lumed.store.vmdir import write_config
from lumed.units import GIB, format_size

_log = EventLog("engine")

# A start takes well under a second, a stop up to 20 s (contract, section 1).
_START_PATIENCE_S = 15.0
_STOP_PATIENCE_S = 22.0
# A clone takes milliseconds, except where it must copy; its clients give up after 60 s.
_CLONE_PATIENCE_S = 50.0
_SCREENSHOT_S = 5.0
_STARTING = frozenset({"run"})
_CHANGING = frozenset({"clone", "update"})


class LocalEngine:
    """See lumed.engine.Engine for what each verb promises. Made by `start_engine`."""

    def __init__(
        self,
        home: Home,
        settings: Settings,
        driver: MachineDriver,
        images: ImageCache,
        find_accelerator: Callable[[Architecture], Awaitable[Accelerator]],
        tasks: TaskOwner,
    ) -> None:
        self._home = home
        self._driver = driver
        self._images = images
        self._find_accelerator = find_accelerator
        self._tasks = tasks
        self._index = VmIndex(Locations(home, settings))
        self._sources = Sources(images, self.settings, driver.check_ready)
        self._keeper = SettingsKeeper(home, settings, self._index, images, self._sources.choose)
        self._operations = Operations(home.operations, tasks, self._tell_operation)
        self._answers = Answers(home.answers)
        self._gate = Gate()
        self._views = Views()
        self._making = Making(self._index, self._gate, self._operations, self._mark)
        self._provisioning = Provisioning(self._sources, driver.check_ready)
        self._pulls = Pulls(
            self._index, self._making, self._sources, self._provisioning, self.settings
        )
        self._library = Library(images, self._index)
        self._power = Power(
            home, driver, tasks, self._accelerator_name, self._get_rescue, self._mark
        )
        self._observer = Observer(self._index, self._making, self._power.live, self._view, tasks)

    async def open(self) -> None:
        """Sweep what a killed server left, and take up its machines."""
        places = [path for _, path in self._index.locations.every()]
        swept = await asyncio.to_thread(sweep, places)
        await self._images.sweep()
        await sweep_networks()
        await self._operations.load()
        for operation_id in swept:
            _log.info("unfinished vm removed", operation=operation_id)
        # The first answer after a boot takes seconds; no request should wait for it.
        self._tasks.create_task(self._prepare_accelerator(), "find accelerator")
        stored = await asyncio.to_thread(self._index.list_vms)
        await adopt_machines(stored, self._home, self._driver, self._power, self._tasks)

    async def close(self) -> None:
        """Leave the machines running and let go of everything."""
        await self._tasks.close()
        for live in list(self._power.live.values()):
            await live.let_go()

    # Looking

    async def list_vms(self, storage: str | None = None) -> list[VmView]:
        """See Engine."""
        location = None if storage is None else self._index.locations.get(storage)[0]
        # Taken before the look at the disk: a VM that is published meanwhile is seen there.
        pending = self._making.list_views(location)
        stored = await asyncio.to_thread(self._index.list_vms, location)
        if self._power.live:
            await asyncio.gather(*(live.check() for live in self._power.live.values()))
        views = [self._view(vm) for vm in stored]
        names = {view.name for view in views}
        views += (view for view in pending if view.name not in names)
        return sorted(views, key=lambda view: view.name) if pending else views

    async def get_vm(self, name: str, storage: str | None = None) -> VmView:
        """See Engine."""
        location = None if storage is None else self._index.locations.get(storage)[0]
        # Taken before the look at the disk, as in list_vms.
        pending = self._making.find_view(name, location)
        try:
            stored = await asyncio.to_thread(self._index.get, name, location)
        except NotFound as error:
            if pending is not None:
                return pending
            self._making.check_pulled(name)
            raise self._making.explain_absence(name, error) from None
        live = self._power.live.get(stored.vm_dir.path)
        if live is not None:
            await live.check()
        return self._view(stored)

    def _view(self, stored: StoredVm) -> VmView:
        path = stored.vm_dir.path
        action = self._gate.action(path)
        operation = self._operations.find_running(stored.name) if action else None
        return self._views.of(stored, self._power.live.get(path), operation)

    # Making and changing

    async def create_vm(self, request: CreateRequest) -> Accepted:
        """See Engine."""
        location_name, location = self._index.locations.get(request.storage)

        async def prepare() -> tuple[VmView, Work]:
            source = await self._provisioning.check(request, location)
            named = replace(request, image=None if source is None else source.name)
            await asyncio.to_thread(self._index.locations.remember, location)

            async def work(operation: RunningOperation) -> None:
                image = None if source is None else await get_image(source, operation)
                await self._provisioning.make(named, image, location, operation)

            return view_of_request(named, location_name), work

        return await self._making.begin("create", request.name, prepare)

    async def clone_vm(self, request: CloneRequest) -> VmView:
        """See Engine."""
        source = await self._get_stored(request.name, request.source_location)
        self._check_stopped(source)
        name, path = request.new_name, source.vm_dir.path
        location_name, location = self._index.locations.get(request.dest_location)
        made = request_of_clone(name, _config_of(source))

        async def prepare() -> tuple[VmView, Work]:
            await asyncio.to_thread(self._index.locations.remember, location)

            async def work(operation: RunningOperation) -> None:
                async with self._gate.wait_for(
                    path, "clone", source.name, behind=_CHANGING, timeout_s=_CLONE_PATIENCE_S
                ):
                    # Looked at again: it may have been changed or run until it was our turn.
                    now = await self._get_stored(source.name, source.location_name)
                    self._check_stopped(now)
                    await make_clone(now.vm_dir, _config_of(now), name, location, operation)
                _log.info("vm cloned", vm=source.name, clone=name)

            return view_of_request(made, location_name), work

        accepted = await self._making.begin("clone", name, prepare)
        await self.finish_operation(accepted.operation.id)
        return await self.get_vm(name, location_name)

    async def update_vm(self, name: str, request: UpdateRequest) -> VmView:
        """See Engine."""
        stored = await self._get_stored(name, request.storage)
        vm_dir = stored.vm_dir
        async with self._gate.wait_for(vm_dir.path, "update", name, behind=_STARTING, timeout_s=0):
            self._check_stopped(stored)
            config = _config_of(stored)
            size = request.disk_size_bytes
            if size is not None and size < config.disk_size_bytes:
                reason = (
                    f"a disk cannot shrink: it has {format_size(config.disk_size_bytes)}, "
                    f"asked for {format_size(size)}"
                )
                raise InvalidField(f"diskSize: {reason}", fields={"diskSize": reason})
            if size is not None and size > config.disk_size_bytes:
                await grow(vm_dir.disk, DiskFormat.QCOW2, size)
            changed = replace(
                config,
                cpu_count=request.cpu_count or config.cpu_count,
                memory_bytes=request.memory_bytes or config.memory_bytes,
                disk_size_bytes=size or config.disk_size_bytes,
                display=request.display or config.display,
            )
            if changed != config:
                await asyncio.to_thread(write_config, vm_dir, changed)
                self._mark(name)
        return self._view(await self._get_stored(name, stored.location_name))

    async def delete_vm(self, name: str, storage: str | None = None) -> None:
        """See Engine."""
        was_unfinished = await self._making.cancel(name)
        was_unfinished |= await self._making.dismiss_failure(name)
        if was_unfinished and await asyncio.to_thread(self._index.find, name) is None:
            return
        stored = await self._get_stored(name, storage)
        path = stored.vm_dir.path
        async with self._gate.wait_for(
            path, "delete", name, behind=frozenset({"run", "stop"}), timeout_s=_STOP_PATIENCE_S
        ):
            live = self._power.live.get(path)
            if live is not None:
                # Its disk is about to go: there is nothing that a shutdown could save.
                await self._power.stop(live, force=True)
            await asyncio.to_thread(remove_vm, stored.vm_dir, os.urandom(8).hex())
        self._mark(name)
        _log.info("vm deleted", vm=name)

    # Running

    async def run_vm(self, name: str, request: RunRequest) -> Accepted:
        """See Engine."""
        stored = await self._get_stored(name, request.storage)
        path = stored.vm_dir.path
        self._gate.enter(path, "run", name)
        try:
            if path in self._power.live:
                raise WrongState(f"Virtual machine already running: {name}")
            config = _config_of(stored)
            plan = await self._power.plan(stored, config, request)
            live = await self._power.claim(stored, config, plan)

            async def work(operation: RunningOperation) -> None:
                await self._power.start(live, config, plan, operation)

            def on_over() -> None:
                self._power.forget_unstarted(live)
                self._gate.leave(path)

            try:
                operation = await self._operations.start("run", name, work, on_over=on_over)
            except BaseException:
                self._power.forget_unstarted(live)
                raise
        except BaseException:
            self._gate.leave(path)
            raise
        return Accepted(self._view(stored), operation)

    async def stop_vm(
        self, name: str, storage: str | None = None, *, force: bool = False
    ) -> VmView:
        """See Engine."""
        stored = await self._get_stored(name, storage)
        path = stored.vm_dir.path
        if self._gate.action(path) == "stop" and (live := self._power.live.get(path)) is not None:
            await self._join_stop(live)
        else:
            async with self._gate.wait_for(
                path, "stop", name, behind=_STARTING, timeout_s=_START_PATIENCE_S
            ):
                live = self._power.live.get(path)
                if live is None:
                    raise WrongState(f"Virtual machine not running: {name}")

                async def work(operation: RunningOperation) -> None:
                    await self._power.stop(live, force=force)

                operation = await self._operations.start("stop", name, work)
                await self.finish_operation(operation.id)
        return self._view(await self._get_stored(name, stored.location_name))

    async def take_screenshot(self, name: str, storage: str | None = None) -> bytes:
        """See Engine."""
        stored = await self._get_stored(name, storage)
        live = self._power.live.get(stored.vm_dir.path)
        if live is None or live.machine is None:
            raise WrongState(f"Virtual machine not running: {name}")
        target = Path(live.record.runtime_dir) / f"{os.urandom(8).hex()}.png"
        try:
            await live.machine.screenshot(target, _SCREENSHOT_S)
            return await asyncio.to_thread(target.read_bytes)
        finally:
            await asyncio.to_thread(target.unlink, missing_ok=True)

    async def _join_stop(self, live: LiveMachine) -> None:
        try:
            async with asyncio.timeout(_STOP_PATIENCE_S):
                await live.ended.wait()
        except TimeoutError:
            raise Busy(f"{live.vm_dir.name} is still being stopped") from None

    def _check_stopped(self, stored: StoredVm) -> None:
        live = self._power.live.get(stored.vm_dir.path)
        if live is not None:
            raise WrongState(
                f"Virtual machine {stored.name} is {live.state.value}; it must be stopped",
                hint=f"POST /lume/vms/{stored.name}/stop",
            )

    async def _get_stored(self, name: str, storage: str | None) -> StoredVm:
        location = None if storage is None else self._index.locations.get(storage)[0]
        try:
            return await asyncio.to_thread(self._index.get, name, location)
        except NotFound as error:
            if self._making.find_view(name, location) is not None:
                raise Busy(
                    f"Virtual machine is still being provisioned: {name}",
                    fields={"action": "create", "name": name},
                ) from None
            raise self._making.explain_absence(name, error) from None

    # Images

    async def pull_vm(self, request: PullRequest) -> Accepted:
        """See Engine."""
        return await self._pulls.begin(request)

    async def cancel_pull(self, name: str) -> None:
        """See Engine."""
        await self._pulls.cancel(name)

    async def push_vm(self, request: PushRequest) -> Operation:
        """See Engine."""
        stored = await self._get_stored(request.name, request.storage)
        path = stored.vm_dir.path
        self._gate.enter(path, "push", request.name)
        try:
            self._check_stopped(stored)
            settings = self._keeper.settings
            work = plan_push(request, stored.vm_dir, _config_of(stored), self._images, settings)
            return await self._operations.start(
                "push", request.name, work, on_over=lambda: self._gate.leave(path)
            )
        except BaseException:
            self._gate.leave(path)
            raise

    async def build_image(self, request: BuildRequest) -> Operation:
        """See Engine."""
        work = await asyncio.to_thread(self._library.plan_build, request)
        return await self._operations.start("build", request.image, work)

    async def list_images(self) -> list[ImageView]:
        """See Engine."""
        return await self._library.list_images()

    async def delete_image(self, name: str) -> ImageView:
        """See Engine."""
        return await self._library.remove(name)

    async def prune_images(self, *, dry_run: bool) -> Pruned:
        """See Engine."""
        return await self._library.prune(dry_run=dry_run)

    # Operations

    def list_operations(self) -> list[Operation]:
        """See Engine."""
        return self._operations.list_all()

    def get_operation(self, operation_id: str) -> Operation:
        """See Engine."""
        return self._operations.get(operation_id)

    async def wait_operation(self, operation_id: str, timeout_s: float) -> Operation:
        """See Engine."""
        return await self._operations.wait(operation_id, timeout_s)

    async def finish_operation(self, operation_id: str) -> Operation:
        """See Engine."""
        over = await self._operations.wait(operation_id, None)
        if over.status is not OperationStatus.SUCCEEDED:
            raise self._operations.get_failure(operation_id)
        return over

    async def cancel_operation(self, operation_id: str) -> Operation:
        """See Engine. A stop cannot be called back."""
        if self._operations.get(operation_id).action == "stop":
            raise WrongState("A stop cannot be cancelled")
        return await self._operations.cancel(operation_id)

    # Watching

    def watch(self, after: str | None, vm: str | None) -> AbstractAsyncContextManager[Subscription]:
        """See Engine."""
        return self._observer.watch(after, vm)

    def _mark(self, name: str) -> None:
        self._observer.mark(name)

    def _tell_operation(self, operation: Operation) -> None:
        self._observer.tell_operation(operation)

    # Requests that come again

    def once(self, key: str, fingerprint: str) -> AbstractAsyncContextManager[KeyedRequest]:
        """See Engine."""
        return self._answers.once(key, fingerprint)

    # Host and settings

    async def host_status(self) -> HostStatus:
        """See Engine."""
        stored = await asyncio.to_thread(self._index.list_vms)
        total, available = await asyncio.to_thread(read_memory)
        _, default = self._index.locations.get(None)
        accelerator: Accelerator | None = None
        with contextlib.suppress(LumedError):
            accelerator = await self._find_accelerator(Architecture.AMD64)
        return HostStatus(
            vm_count=len(stored) + len(self._making),
            running_count=len(self._power.live),
            max_vms=max(total // GIB, len(self._power.live)),
            cpu_count=os.cpu_count() or 1,
            memory_total_bytes=total,
            memory_available_bytes=available,
            disk_free_bytes=await asyncio.to_thread(free_bytes, default),
            accelerator=accelerator.name if accelerator else None,
            accelerator_reason=accelerator.reason if accelerator else None,
            network_interfaces=tuple(await asyncio.to_thread(list_interfaces)),
        )

    async def measure_machines(self) -> list[MachineUsage]:
        """See Engine."""
        return await asyncio.to_thread(measure_machines, self._index, dict(self._power.live))

    def settings(self) -> Settings:
        """See Engine."""
        return self._keeper.settings

    def locations(self) -> dict[str, Path]:
        """See Engine."""
        return self._index.locations.named()

    async def change_settings(self, change: SettingsChange) -> Settings:
        """See Engine."""
        changed = await self._keeper.change(change)
        self._observer.mark_all()
        return changed

    async def add_location(self, name: str, path: str) -> Path:
        """See Engine."""
        directory = await self._keeper.add_location(name, path)
        self._observer.mark_all()
        return directory

    async def remove_location(self, name: str) -> None:
        """See Engine."""
        await self._keeper.remove_location(name)
        self._observer.mark_all()

    async def set_default_location(self, name: str) -> None:
        """See Engine."""
        await self._keeper.set_default_location(name)

    async def read_logs(self, kind: str, lines: int | None) -> dict[str, str]:
        """See Engine."""
        return await asyncio.to_thread(read_logs, self._home, kind, lines)

    def follow_log(self, kind: str, lines: int | None) -> AsyncGenerator[bytes, None]:
        """See Engine."""
        return follow_log(self._home, kind, lines)

    async def read_vm_logs(
        self, name: str, storage: str | None, kind: str, lines: int | None
    ) -> dict[str, str]:
        """See Engine."""
        stored = await self._get_stored(name, storage)
        return await asyncio.to_thread(read_vm_logs, stored.vm_dir, kind, lines)

    async def follow_vm_log(
        self, name: str, storage: str | None, kind: str, lines: int | None
    ) -> AsyncGenerator[bytes, None]:
        """See Engine."""
        stored = await self._get_stored(name, storage)
        return follow_vm_log(stored.vm_dir, kind, lines)

    async def _prepare_accelerator(self) -> None:
        with contextlib.suppress(LumedError):
            accelerator = await self._find_accelerator(Architecture.AMD64)
            _log.info("accelerator", name=accelerator.name, reason=accelerator.reason)

    async def _accelerator_name(self, architecture: Architecture) -> str:
        return (await self._find_accelerator(architecture)).name

    async def _get_rescue(self, operation: RunningOperation) -> RescueSystem:
        image = await self._images.get_builtin("tiny", operation.report)
        if image.kernel is None or image.initramfs is None:
            raise NotFound("The image tiny has no kernel of its own")
        return RescueSystem(image.kernel, image.initramfs)


@contextlib.asynccontextmanager
async def start_engine(
    home: Home,
    settings: Settings,
    driver: MachineDriver,
    images: ImageCache,
    find_accelerator: Callable[[Architecture], Awaitable[Accelerator]],
) -> AsyncIterator[LocalEngine]:
    """An engine over a prepared home, its machines adopted; they stay when it ends."""
    engine = LocalEngine(home, settings, driver, images, find_accelerator, TaskOwner())
    try:
        await engine.open()
        yield engine
    finally:
        await engine.close()


def _config_of(stored: StoredVm) -> VmConfig:
    if stored.config is None:
        raise stored.damage or NotFound(f"Virtual machine not found: {stored.name}")
    return stored.config
