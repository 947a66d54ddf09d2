"""Making a VM: checks first, then the image, the disk and the configuration, then one rename."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lumed.errors import InvalidField, NotPossibleHere
from lumed.files import check_free_space, expand_path
from lumed.guest.seed import check_user_data
from lumed.images.inspect import DiskFacts, inspect_disk
from lumed.images.local import ImageCache
from lumed.images.record import CachedImage
from lumed.model.request import CreateRequest
from lumed.model.vm import Firmware, GuestOs, VmConfig
from lumed.naming import new_mac_address
from lumed.network.plan import parse_network
from lumed.osproc import get_program
from lumed.service.operations import RunningOperation, utc_now
from lumed.store.disk import create_empty, create_overlay
from lumed.store.staging import start_staging
from lumed.store.vmdir import write_config
from lumed.threads import run_to_end
from lumed.units import MIB, format_size

# What a fresh overlay and its configuration take at most.
_NEEDED_BYTES = 4 * MIB


@dataclass(frozen=True, slots=True)
class ImageChoice:
    """What a disk is made from: a built-in image's name, or a local file with its facts."""

    name: str
    file: Path | None = None
    facts: DiskFacts | None = None


class Provisioning:
    """Makes VMs in a location; knows nothing of those that exist."""

    def __init__(self, images: ImageCache) -> None:
        self._images = images

    async def check(
        self, request: CreateRequest, location: Path, default_image: str
    ) -> ImageChoice | None:
        """Everything that can be known before work begins; the image, None for an empty disk."""
        if request.os is GuestOs.MACOS:
            raise NotPossibleHere(
                "macOS guests need Apple hardware and Apple's virtualization framework",
                hint='use "os": "linux"',
            )
        parse_network(request.network)
        if request.user_data is not None:
            check_user_data(request.user_data)
        for key in request.ssh_keys:
            if not key.isprintable() or len(key.split()) < 2:
                reason = f"{key!r:.40} is no public key; it looks like 'ssh-ed25519 AAAA… name'"
                raise InvalidField(f"sshKeys: {reason}", fields={"sshKeys": reason})
        choice = await self._choose_image(request, default_image)
        get_program("qemu-img", package="qemu-utils")
        await asyncio.to_thread(check_location, location, f"create {request.name}")
        return choice

    async def _choose_image(self, request: CreateRequest, default_image: str) -> ImageChoice | None:
        field = "ipsw" if request.image is None else "image"
        name = request.image or request.ipsw
        if name is None:
            return None
        if name == "latest":
            name = default_image
        if name in self._images.builtin_names:
            return ImageChoice(name)
        if "/" not in name:
            known = ", ".join(sorted(self._images.builtin_names))
            reason = f"{name!r:.80} is not known; known are {known}, or a path of a disk image"
            raise InvalidField(f"{field}: {reason}", fields={field: reason})
        try:
            file = expand_path(name)
        except ValueError as error:
            reason = f"{name!r:.80} {error}"
            raise InvalidField(f"{field}: {reason}", fields={field: reason}) from error
        facts = await inspect_disk(file)
        _check_fits(request, facts)
        return ImageChoice(str(file), file, facts)

    async def make(
        self,
        request: CreateRequest,
        choice: ImageChoice | None,
        location: Path,
        operation: RunningOperation,
    ) -> None:
        """Make the VM; whatever fails or is cancelled on the way leaves nothing behind."""
        image = None if choice is None else await self._get_image(choice, operation)
        if image is not None:
            _check_fits(request, image.facts)
        operation.stage("making the disk")
        async with start_staging(location, operation.id) as staged:
            if image is None:
                await create_empty(staged.vm_dir.disk, request.disk_size_bytes)
                firmware = Firmware.UEFI
            else:
                facts = image.facts
                size = max(request.disk_size_bytes, facts.virtual_size_bytes)
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
                image=None if choice is None else choice.name,
                ports=request.ports,
                ssh_keys=request.ssh_keys,
                user_data=request.user_data,
                created_at=utc_now(),
            )
            # To the end even when cancelled: the folder is removed right after.
            await run_to_end(partial(write_config, staged.vm_dir, config))
            await run_to_end(partial(staged.publish, request.name))

    async def _get_image(self, choice: ImageChoice, operation: RunningOperation) -> CachedImage:
        operation.stage(f"getting the image {choice.name}")
        if choice.file is not None:
            return await self._images.import_file(choice.file, operation.report)
        return await self._images.get_builtin(choice.name, operation.report)


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
