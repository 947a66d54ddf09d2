"""Pulls, from a name in a registry to a VM, and pushes, from a VM to a name."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from lumed.engine import Accepted
from lumed.errors import InvalidField, NotFound
from lumed.images.auth import Credentials
from lumed.images.local import ImageCache
from lumed.images.reference import ImageReference, parse_full_reference, parse_reference
from lumed.model.image import ImageAbout
from lumed.model.request import CreateRequest, PullRequest, PushRequest
from lumed.model.view import VmView
from lumed.model.vm import Display, VmConfig, VmState
from lumed.naming import check_vm_name
from lumed.service.making import Making, Work
from lumed.service.operations import RunningOperation
from lumed.service.provisioning import Provisioning
from lumed.service.sources import Sources, get_image
from lumed.service.view import view_of_request
from lumed.settings import Settings
from lumed.store.index import VmIndex
from lumed.store.vmdir import VmDir
from lumed.threads import in_loop
from lumed.units import GIB

# For images that do not say; Lume's own always do.
_CPU_COUNT, _MEMORY_BYTES = 2, 4 * GIB


class Pulls:
    """Makes VMs of images in registries."""

    def __init__(
        self,
        index: VmIndex,
        making: Making,
        sources: Sources,
        provisioning: Provisioning,
        settings: Callable[[], Settings],
    ) -> None:
        self._index = index
        self._making = making
        self._sources = sources
        self._provisioning = provisioning
        self._settings = settings

    async def begin(self, request: PullRequest) -> Accepted:
        """Begin to pull; see Engine.pull_vm."""
        reference = find_reference(
            request.image, request.registry, request.organization, self._settings()
        )
        name = check_vm_name(request.name or reference.name)
        credentials = make_credentials(request.username, request.password)
        location_name, location = self._index.locations.get(request.storage)

        async def prepare() -> tuple[VmView, Work]:
            await self._provisioning.check_place(location, name)
            await asyncio.to_thread(self._index.locations.remember, location)
            first = _plan_vm(name, reference, ImageAbout(), 0)

            def accept(about: ImageAbout) -> None:
                view = _view(_plan_vm(name, reference, about, 0), location_name)
                self._making.change(name, view)

            async def work(operation: RunningOperation) -> None:
                source = await self._sources.choose_remote(
                    reference, credentials, renew=True, accept=accept
                )
                image = await get_image(source, operation)
                vm = _plan_vm(name, reference, image.about, image.facts.virtual_size_bytes)
                await self._provisioning.make(vm, image, location, operation)

            return _view(first, location_name), work

        return await self._making.begin("pull", name, prepare)

    async def cancel(self, name: str) -> None:
        """End a pull, and wait for that. Raises NotFound if none is under way."""
        if not await self._making.cancel(name, ("pull",)):
            raise NotFound(f"No pull is under way for {name}")


def find_reference(
    image: str, registry: str | None, organization: str | None, settings: Settings
) -> ImageReference:
    """The reference of a request; a name with a host needs neither of the other two."""
    full = parse_full_reference(image) if registry is None and organization is None else None
    return full or parse_reference(
        image,
        settings.registry if registry is None else registry,
        settings.organization if organization is None else organization,
    )


def make_credentials(username: str | None, password: str | None) -> Credentials | None:
    """A login of a request, None without. Raises InvalidField if one half is missing."""
    if not username and not password:
        return None
    if not username or not password:
        missing = "password" if username else "username"
        reason = "username and password go together"
        raise InvalidField(f"{missing}: {reason}", fields={missing: reason})
    return Credentials(username, password)


def _plan_vm(
    name: str, reference: ImageReference, about: ImageAbout, disk_bytes: int
) -> CreateRequest:
    return CreateRequest(
        name=name,
        os=about.os,
        cpu_count=about.cpu_count or _CPU_COUNT,
        memory_bytes=about.memory_bytes or _MEMORY_BYTES,
        disk_size_bytes=disk_bytes,
        display=about.display or Display(),
        image=str(reference),
    )


def _view(request: CreateRequest, location_name: str) -> VmView:
    return view_of_request(request, location_name, VmState.PULLING)


def plan_push(
    request: PushRequest, vm_dir: VmDir, config: VmConfig, cache: ImageCache, settings: Settings
) -> Work:
    """The work of a push, everything that can be checked without the registry checked.

    The VM must stay stopped until it is over. Raises InvalidField, NotPossibleHere.
    """
    references = [_push_reference(request, tag, settings) for tag in request.tags]
    credentials = make_credentials(request.username, request.password)

    async def work(operation: RunningOperation) -> None:
        stop = threading.Event()
        report = in_loop(operation.report)

        def push() -> str:
            # With its HTTP client and compressors: only when needed, and not in the loop.
            from lumed.images.manifests import PushSource
            from lumed.images.push import push_image
            from lumed.images.registry import Registry

            source = PushSource(
                disk=vm_dir.disk,
                os=config.os,
                cpu_count=config.cpu_count,
                memory_bytes=config.memory_bytes,
                display=config.display,
                network=config.network,
                architecture=config.architecture,
                firmware=config.firmware,
                uefi_vars=vm_dir.uefi_vars if vm_dir.uefi_vars.exists() else None,
            )
            with Registry(
                references[0].registry,
                credentials=credentials,
                insecure=settings.insecure_registries,
                stop=stop,
            ) as registry:
                return push_image(
                    registry,
                    references,
                    source,
                    format=request.format,
                    work=cache.scratch,
                    records=cache.push_records,
                    stop=stop,
                    report=report,
                    chunk_bytes=request.chunk_bytes,
                    single_layer=request.single_layer,
                )

        operation.tell_result(await cache.run_long(push, stop))

    return work


def _push_reference(request: PushRequest, tag: str, settings: Settings) -> ImageReference:
    if ":" in request.image_name.rsplit("/", 1)[-1] or "@" in request.image_name:
        reason = f"{request.image_name!r:.80} has a tag; tags have a list of their own"
        raise InvalidField(f"imageName: {reason}", fields={"imageName": reason})
    try:
        return find_reference(
            f"{request.image_name}:{tag}", request.registry, request.organization, settings
        )
    except InvalidField as error:
        if "image" not in error.fields:
            raise
        reason = str(error.fields["image"])
        raise InvalidField(f"imageName: {reason}", fields={"imageName": reason}) from error
