"""Making a VM: checks first, then the image, the disk and the configuration, then one rename."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

from lumed.errors import InvalidField, NotPossibleHere
from lumed.files import check_free_space
from lumed.guest.seed import check_user_data
from lumed.images.inspect import DiskFacts
from lumed.images.local import hold_image
from lumed.images.record import CachedImage
from lumed.model.request import CreateRequest
from lumed.model.vm import Architecture, Firmware, GuestOs, VmConfig
from lumed.naming import new_mac_address
from lumed.network.plan import parse_network
from lumed.osproc import get_program
from lumed.service.operations import RunningOperation, utc_now
from lumed.service.sources import CheckMachine, Source, Sources
from lumed.store.disk import create_empty, create_overlay
from lumed.store.layers import link_file
from lumed.store.staging import start_staging
from lumed.store.vmdir import write_config
from lumed.threads import run_to_end
from lumed.units import MIB, format_size

# What a fresh overlay and its configuration take at most.
_NEEDED_BYTES = 4 * MIB


class Provisioning:
    """Makes VMs in a location; knows nothing of those that exist."""

    def __init__(self, sources: Sources, check_machine: CheckMachine) -> None:
        self._sources = sources
        self._check_machine = check_machine

    async def check(self, request: CreateRequest, location: Path) -> Source | None:
        """Everything that can be known before work begins; the image, None for an empty disk."""
        check_os(request.os)
        parse_network(request.network)
        if request.user_data is not None:
            check_user_data(request.user_data)
        for key in request.ssh_keys:
            if not key.isprintable() or len(key.split()) < 2:
                reason = f"{key!r:.40} is no public key; it looks like 'ssh-ed25519 AAAA… name'"
                raise InvalidField(f"sshKeys: {reason}", fields={"sshKeys": reason})
        name = request.image or request.ipsw
        source = None
        if name is not None:
            source = await self._sources.choose(name, "image" if request.image else "ipsw")
            if source.facts is not None:
                _check_fits(request, source.facts)
        await self.check_place(location, request.name)
        return source

    async def check_place(self, location: Path, name: str) -> None:
        """Whether a VM can be made there. Raises InvalidField (storage) or NoSpace."""
        get_program("qemu-img", package="qemu-utils")
        await asyncio.to_thread(check_location, location, f"create {name}")

    async def make(
        self,
        request: CreateRequest,
        image: CachedImage | None,
        location: Path,
        operation: RunningOperation,
    ) -> None:
        """Make the VM; whatever fails or is cancelled on the way leaves nothing behind."""
        if image is not None:
            check_os(image.about.os)
            _check_fits(request, image.facts)
            firmware = request.firmware or image.facts.firmware
            await self._check_machine(image.about.architecture, firmware)
        operation.stage("making the disk")
        async with AsyncExitStack() as stack:
            staged = await stack.enter_async_context(start_staging(location, operation.id))
            if image is None:
                await create_empty(staged.vm_dir.disk, request.disk_size_bytes)
                firmware = Firmware.UEFI
            else:
                facts = image.facts
                size = max(request.disk_size_bytes, facts.virtual_size_bytes)
                # Until the VM is there: from then on its link, or its disk, keeps the image.
                await run_to_end(partial(stack.enter_context, hold_image(image)))
                # False on another file system, where disks are looked at before a removal.
                await run_to_end(partial(link_file, image.disk, staged.vm_dir.image_link))
                await create_overlay(staged.vm_dir.disk, image.disk, facts.format, size)
                firmware = facts.firmware
            config = VmConfig(
                uuid=str(uuid.uuid4()),
                os=request.os,
                cpu_count=request.cpu_count,
                memory_bytes=request.memory_bytes,
                disk_size_bytes=request.disk_size_bytes,
                display=request.display,
                mac_address=new_mac_address(),
                network=request.network,
                firmware=request.firmware or firmware,
                image=request.image,
                ports=request.ports,
                ssh_keys=request.ssh_keys,
                user_data=request.user_data,
                architecture=Architecture.AMD64 if image is None else image.about.architecture,
                created_at=utc_now(),
            )
            # To the end even when cancelled: the folder is removed right after.
            await run_to_end(partial(write_config, staged.vm_dir, config))
            await run_to_end(partial(staged.publish, request.name))


def check_os(os: GuestOs) -> None:
    """Raise NotPossibleHere for macOS (contract, section 7)."""
    if os is GuestOs.MACOS:
        raise NotPossibleHere(
            "macOS guests need Apple hardware and Apple's virtualization framework",
            hint='use "os": "linux"',
        )


def _check_fits(request: CreateRequest, facts: DiskFacts) -> None:
    if request.disk_size_bytes < facts.virtual_size_bytes:
        needed = format_size(facts.virtual_size_bytes)
        reason = f"{format_size(request.disk_size_bytes)} is smaller than the image, {needed}"
        raise InvalidField(f"diskSize: {reason}", fields={"diskSize": reason})


def check_location(location: Path, what: str) -> None:
    """Make a location's folder if need be. Raises InvalidField, NoSpace if it is nearly full."""
    try:
        location.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        reason = f"{location} cannot be used: {error.strerror}"
        raise InvalidField(f"storage: {reason}", fields={"storage": reason}) from error
    check_free_space(location, _NEEDED_BYTES, what)
