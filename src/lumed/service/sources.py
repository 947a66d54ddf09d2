"""Where a VM's disk can come from, by the name that the user gives.

In this order: `latest` (the configured default), a built-in image, an image that the cache knows
under that name, a full reference (`host/repository:tag`), the path of a local file, a name of
the catalog.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lumed.errors import InvalidField
from lumed.files import expand_path
from lumed.images.auth import Credentials
from lumed.images.inspect import DiskFacts, inspect_disk
from lumed.images.local import ImageCache, Report
from lumed.images.record import CachedImage
from lumed.images.reference import ImageReference, parse_full_reference
from lumed.model.image import ImageAbout
from lumed.model.vm import Architecture, Firmware, GuestOs
from lumed.service.operations import RunningOperation
from lumed.settings import Settings, catalog_path

if TYPE_CHECKING:
    from lumed.images.catalog import Catalog

# Raises MissingDependency or InvalidField if this host cannot run such a machine.
CheckMachine = Callable[[Architecture, Firmware], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Source:
    """An image that can be had. facts are there if it is at hand; get may take minutes."""

    name: str
    get: Callable[[Report], Awaitable[CachedImage]]
    facts: DiskFacts | None = None


async def get_image(source: Source, operation: RunningOperation) -> CachedImage:
    """The image of a source, with its progress told."""
    operation.stage(f"getting the image {source.name}")
    return await source.get(operation.report)


class Sources:
    """Finds images by name, and gets them into the cache."""

    def __init__(
        self, cache: ImageCache, settings: Callable[[], Settings], check_machine: CheckMachine
    ) -> None:
        """check_machine raises for a processor that no machine of this host has."""
        self._cache = cache
        self._settings = settings
        self._check_machine = check_machine

    async def choose(self, name: str, field: str) -> Source:
        """The source of that name. Raises InvalidField (`field`) that says what is known."""
        if name == "latest":
            name = self._settings().default_image
        if name in self._cache.builtin_names:
            return Source(name, partial(self._cache.get_builtin, name))
        cached = await asyncio.to_thread(self._cache.find_named, name)
        if cached is not None:
            return _at_hand(name, cached)
        reference = parse_full_reference(name)
        if reference is not None:
            return await self.choose_remote(reference)
        if "/" in name:
            try:
                file = expand_path(name)
            except ValueError as error:
                raise _refuse(field, f"{name!r:.80} {error}") from error
            facts = await inspect_disk(file)
            return Source(str(file), partial(self._cache.import_file, file), facts)
        return await self._choose_vendor(name, field)

    async def _choose_vendor(self, name: str, field: str) -> Source:
        settings = self._settings()
        extra = None if settings.path is None else catalog_path(settings.path)
        catalog = await asyncio.to_thread(_read_catalog, extra, settings.mirrors)
        if not catalog.knows(name):
            known = ", ".join(
                catalog.find_close(name) or (*sorted(self._cache.builtin_names), *catalog.names)
            )
            raise _refuse(
                field,
                f"{name!r:.80} is not known; known are {known}, "
                "a path, or a full reference such as ghcr.io/org/name:tag",
            )
        from lumed.images.catalog import get_vendor_image

        image = catalog.get(name, Architecture.AMD64)
        return Source(image.name, partial(get_vendor_image, self._cache, image))

    async def choose_remote(
        self,
        reference: ImageReference,
        credentials: Credentials | None = None,
        *,
        renew: bool = False,
        accept: Callable[[ImageAbout], object] = lambda _: None,
    ) -> Source:
        """An image of a registry; renew also asks there when the cache knows the name.

        accept gets what the image says of itself before its first byte, and may raise.
        """
        if not renew:
            cached = await asyncio.to_thread(self._cache.find_named, str(reference))
            if cached is not None:
                return _at_hand(str(reference), cached)
        return Source(str(reference), partial(self._fetch, reference, credentials, accept))

    async def _fetch(
        self,
        reference: ImageReference,
        credentials: Credentials | None,
        accept: Callable[[ImageAbout], object],
        report: Report,
    ) -> CachedImage:
        async def look(about: ImageAbout) -> None:
            accept(about)
            # Before the first byte; an image of macOS comes into the cache whatever its processor.
            if about.os is GuestOs.LINUX:
                await self._check_machine(about.architecture, Firmware.UEFI)

        await asyncio.to_thread(_import_remote)
        from lumed.images.remote import fetch_image

        return await fetch_image(
            self._cache,
            reference,
            credentials,
            insecure=self._settings().insecure_registries,
            accept=look,
            report=report,
        )


def _read_catalog(extra: Path | None, mirrors: Mapping[str, str]) -> Catalog:
    # With its HTTP client: only when needed, and 0.1 s that the event loop need not wait.
    from lumed.images.catalog import read_catalog

    return read_catalog(extra, mirrors)


def _import_remote() -> None:
    """With its HTTP client and decoders; see above."""
    import lumed.images.remote  # noqa: F401


def _at_hand(name: str, image: CachedImage) -> Source:
    async def get(_: Report) -> CachedImage:
        return image

    return Source(name, get, image.facts)


def _refuse(field: str, reason: str) -> InvalidField:
    return InvalidField(f"{field}: {reason}", fields={field: reason})
