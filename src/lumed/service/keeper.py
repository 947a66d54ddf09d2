"""The settings in force: changed, kept on disk, and put to use without a restart."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from lumed.errors import AlreadyExists, Conflict, InvalidField
from lumed.files import expand_path
from lumed.images.local import ImageCache
from lumed.images.reference import parse_reference
from lumed.model.request import SettingsChange
from lumed.naming import check_location_name
from lumed.settings import Settings, with_location, write_settings
from lumed.store.index import VmIndex
from lumed.store.layout import Home
from lumed.store.locations import Locations


class SettingsKeeper:
    """Holds the settings of a home. No change of them hides a VM."""

    def __init__(
        self,
        home: Home,
        settings: Settings,
        index: VmIndex,
        images: ImageCache,
        check_image: Callable[[str, str], Awaitable[object]],
    ) -> None:
        """check_image raises InvalidField for a name of no image, with the field's name."""
        self._home = home
        self._settings = settings
        self._index = index
        self._images = images
        self._check_image = check_image

    @property
    def settings(self) -> Settings:
        """The settings, every place in them filled in."""
        cache = self._settings.cache_directory or str(self._home.cache)
        return replace(self._settings, cache_directory=cache)

    async def change(self, change: SettingsChange) -> Settings:
        """Change what is not None; all of it or, on InvalidField, nothing."""
        settings = self._settings
        if change.home_directory is not None:
            path = await _get_directory(change.home_directory, "homeDirectory")
            settings = with_location(settings, "home", path)
        if change.cache_directory is not None:
            path = await _get_directory(change.cache_directory, "cacheDirectory")
            settings = replace(settings, cache_directory=path)
        if change.caching_enabled is not None:
            settings = replace(settings, caching_enabled=change.caching_enabled)
        if change.default_image is not None:
            if change.default_image == "latest":
                reason = "latest stands for the default image; name another"
                raise InvalidField(f"defaultImage: {reason}", fields={"defaultImage": reason})
            await self._check_image(change.default_image, "defaultImage")
            settings = replace(settings, default_image=change.default_image)
        if change.registry is not None or change.organization is not None:
            registry = settings.registry if change.registry is None else change.registry
            organization = (
                settings.organization if change.organization is None else change.organization
            )
            parse_reference("name", registry, organization)  # raises for what no image can be in
            settings = replace(settings, registry=registry, organization=organization)
        await self._apply(settings)
        return self.settings

    async def add_location(self, name: str, path: str) -> Path:
        """Configure a location; a built-in name may be given another folder once."""
        if check_location_name(name) in self._settings.locations:
            raise AlreadyExists(f"VM location with name '{name}' already exists")
        directory = await _get_directory(path, "path")
        await self._apply(with_location(self._settings, name, directory))
        return Path(directory)

    async def remove_location(self, name: str) -> None:
        """Forget a location's name; VMs in it stay, under its path."""
        if name not in self._settings.locations:
            self._index.locations.find_named(name)
            raise Conflict(f"The location '{name}' is built in and cannot be removed")
        if name == self._settings.default_location:
            raise Conflict(
                f"Cannot remove the default location '{name}'. Set a new default location first."
            )
        left = {key: path for key, path in self._settings.locations.items() if key != name}
        await self._apply(replace(self._settings, locations=left))

    async def set_default_location(self, name: str) -> None:
        """Choose the location for requests that name none."""
        self._index.locations.find_named(name)
        await self._apply(replace(self._settings, default_location=name))

    async def _apply(self, settings: Settings) -> None:
        if settings == self._settings:
            return
        await asyncio.to_thread(self._switch_locations, settings)
        self._settings = settings
        self._images.use_directory(Path(settings.cache_directory or self._home.cache) / "images")

    def _switch_locations(self, settings: Settings) -> None:
        before = self._index.locations.every()
        after = Locations(self._home, settings)
        kept = {path for _, path in after.every()}
        for name, path in before:
            if path not in kept and self._index.list_vms(name):
                after.remember(path)
        write_settings(settings)
        self._index.locations = after


async def _get_directory(text: str, field: str) -> str:
    return str(await asyncio.to_thread(_usable_directory, text, field))


def _usable_directory(text: str, field: str) -> Path:
    try:
        path = Path(os.path.normpath(expand_path(text)))
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(path, os.W_OK | os.X_OK):
            raise ValueError("cannot be written by this server's user")
    except (OSError, ValueError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        raise InvalidField(f"{field}: {text!r:.100} {reason}", fields={field: reason}) from error
    return path
