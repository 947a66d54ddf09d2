"""The images of the cache: built, listed, and removed if no VM rests on them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from lumed.errors import Damaged, NotFound, WrongState
from lumed.images.blobs import drop_idle_blobs
from lumed.images.local import ImageCache, is_linked
from lumed.images.record import RECORD, CachedImage
from lumed.images.reference import parse_full_reference
from lumed.model.image import ImageView, Pruned
from lumed.model.request import BuildRequest
from lumed.service.making import Work
from lumed.service.operations import RunningOperation
from lumed.store.index import StoredVm, VmIndex
from lumed.store.layers import find_image


class Library:
    """Lists and removes images; never one that a VM's disk rests on."""

    def __init__(self, cache: ImageCache, index: VmIndex) -> None:
        self._cache = cache
        self._index = index
        self._building = asyncio.Lock()  # one takes both cores

    async def list_images(self) -> list[ImageView]:
        """Every image in the cache, by name."""
        return await asyncio.to_thread(self._list)

    async def remove(self, name: str) -> ImageView:
        """Forget a name, and remove its image with the last one. Raises NotFound, WrongState."""
        return await asyncio.to_thread(self._remove, name)

    def plan_build(self, request: BuildRequest) -> Work:
        """The work of a build. Raises InvalidField; imports the builder, so not in the loop."""
        from lumed.images.build import debian_guest, plan_recipe

        guest = debian_guest(plan_recipe(request.image, request.packages, request.run))

        async def work(operation: RunningOperation) -> None:
            operation.stage("waiting for another build")
            async with self._building:
                image = await self._cache.get_or_make(
                    f"{request.image.replace(':', '-')}-{guest.version}",
                    request.image,
                    lambda path: guest.build(path, operation.stage),
                )
            await asyncio.to_thread(self._cache.names.write, request.image, image.id)
            operation.tell_result(image.id)

        return work

    async def prune(self, *, dry_run: bool) -> Pruned:
        """Remove every image that nothing rests on, and downloads that nobody goes on with."""
        return await asyncio.to_thread(self._prune, dry_run)

    def _list(self) -> list[ImageView]:
        names = self._cache.names.read_all()
        users = self._find_users()
        views = []
        for image in self._cache.list_images():
            # Somebody may remove it just now.
            with contextlib.suppress(FileNotFoundError):
                views.append(_view(image, names, users))
        return sorted(views, key=lambda view: (view.names, view.id))

    def _find_users(self) -> dict[Path, list[str]]:
        """The disks of images, with the VMs that rest on them."""
        users: dict[Path, list[str]] = {}
        for vm in self._index.list_vms():
            if (image := _find_base(vm)) is not None:
                users.setdefault(image, []).append(vm.name)
        return users

    def _remove(self, name: str) -> ImageView:
        # A name is as good with the host and the tag as without what has a default.
        reference = parse_full_reference(name)
        wanted = {name} if reference is None else {name, str(reference)}
        for view in self._list():
            if view.id == name or wanted & set(view.names):
                break
        else:
            raise NotFound(f"Image not found: {name}", hint="GET /lume/images lists them")
        others = set(view.names) - wanted
        if others and view.id != name:
            for one in wanted:
                self._cache.names.remove(one)
            return view
        if view.is_used:
            raise _in_use(view)
        image = self._cache.find(view.id)
        if image is not None:
            self._cache.remove(image)
        return view

    def _prune(self, dry_run: bool) -> Pruned:
        removed: list[ImageView] = []
        kept: list[ImageView] = []
        for view in self._list():
            image = None if view.is_used else self._cache.find(view.id)
            if image is not None and not dry_run:
                try:
                    self._cache.remove(image)
                except WrongState:
                    image = None
            (kept if image is None else removed).append(view)
        freed_bytes = drop_idle_blobs(self._cache.blobs, dry_run=dry_run)
        freed_bytes += sum(view.allocated_bytes for view in removed)
        return Pruned(tuple(removed), tuple(kept), freed_bytes)


def _find_base(vm: StoredVm) -> Path | None:
    # A disk that cannot be read names nothing; its VM shows as broken.
    with contextlib.suppress(Damaged, OSError):
        backing = find_image(vm.vm_dir.disk)
        return None if backing is None else Path(backing.name)
    return None


def _view(
    image: CachedImage, names: Mapping[str, str], users: Mapping[Path, list[str]]
) -> ImageView:
    vms = tuple(sorted(users.get(image.disk, ())))
    given = tuple(sorted(name for name, image_id in names.items() if image_id == image.id))
    record = image.directory / RECORD
    return ImageView(
        id=image.id,
        names=given or (image.name,),
        about=image.about,
        format=image.facts.format.value,
        virtual_size_bytes=image.facts.virtual_size_bytes,
        allocated_bytes=image.facts.allocated_bytes,
        created_at=_time(image.disk.stat().st_mtime),
        last_used_at=_time(record.stat().st_mtime),
        vms=vms,
        is_used=bool(vms) or is_linked(image),
    )


def _time(timestamp: float) -> str:
    time = datetime.fromtimestamp(timestamp, UTC)
    return time.isoformat(timespec="seconds").replace("+00:00", "Z")


def _in_use(view: ImageView) -> WrongState:
    who = ", ".join(view.vms) or "a VM of another home"
    return WrongState(
        f"The image {view.names[0]} is in use: {who} rests on it",
        hint="delete those VMs first",
        fields={"vms": list(view.vms)},
    )
