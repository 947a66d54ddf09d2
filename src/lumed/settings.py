"""The settings file: what the user has chosen for this home.

`$XDG_CONFIG_HOME/lume/config.yaml` (Lume's place) for the default home, `config.yaml` inside a
home that was named; Lume's keys, plus ours.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import yaml

from lumed.errors import Damaged, InvalidField
from lumed.files import write_atomic

DEFAULT_IMAGE = "tiny"
BUILTIN_LOCATIONS = ("home", "ssd", "hdd", "nvme", "ephemeral")


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a home.

    locations maps names to absolute paths and holds only what was configured; the built-in
    ones (`home`, `ssd` and so on) are folders of the home until they appear here.
    """

    default_location: str = "home"
    locations: dict[str, str] = field(default_factory=dict)
    cache_directory: str | None = None
    caching_enabled: bool = True
    default_image: str = DEFAULT_IMAGE
    registry: str = "ghcr.io"
    organization: str = "trycua"
    accelerator: str | None = None
    path: Path | None = None


def settings_path(home: Path, *, named: bool) -> Path:
    """Where the settings of a home are; `named` is True if the user named the home."""
    if named:
        return home / "config.yaml"
    config_home = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(config_home) / "lume" / "config.yaml"


def read_settings(path: Path) -> Settings:
    """The settings in a file, defaults if there is none.

    Raises Damaged with the reason if the file cannot be understood: guessing where VMs are
    would hide them.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        return Settings(path=path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _damaged(path, str(error)) from error
    if data is None:
        return Settings(path=path)
    if not isinstance(data, dict):
        raise _damaged(path, "it is no mapping")
    try:
        return _from_yaml(data, path)
    except (TypeError, KeyError, ValueError, AttributeError, InvalidField) as error:
        raise _damaged(path, str(error)) from error


def _from_yaml(data: dict[str, object], path: Path) -> Settings:
    locations: dict[str, str] = {}
    for entry in cast("list[dict[str, str]]", data.get("vmLocations") or []):
        locations[str(entry["name"])] = str(Path(str(entry["path"])).expanduser())
    registry = cast("dict[str, dict[str, str]]", data.get("registry") or {}).get("ghcr") or {}
    cache = data.get("cacheDirectory")
    accelerator = data.get("accelerator")
    return Settings(
        default_location=str(data.get("defaultLocationName") or "home"),
        locations=locations,
        cache_directory=None if cache is None else str(Path(str(cache)).expanduser()),
        caching_enabled=bool(data.get("cachingEnabled", True)),
        default_image=str(data.get("defaultImage") or DEFAULT_IMAGE),
        registry=str(registry.get("registry") or "ghcr.io"),
        organization=str(registry.get("organization") or "trycua"),
        accelerator=None if accelerator is None else str(accelerator),
        path=path,
    )


def write_settings(settings: Settings) -> None:
    """Write the settings back to the file they came from."""
    if settings.path is None:
        raise ValueError("settings without a file")
    data: dict[str, object] = {
        "defaultLocationName": settings.default_location,
        "cachingEnabled": settings.caching_enabled,
        "defaultImage": settings.default_image,
        "vmLocations": [{"name": n, "path": p} for n, p in sorted(settings.locations.items())],
        "registry": {
            "type": "ghcr",
            "ghcr": {"registry": settings.registry, "organization": settings.organization},
        },
    }
    if settings.cache_directory is not None:
        data["cacheDirectory"] = settings.cache_directory
    if settings.accelerator is not None:
        data["accelerator"] = settings.accelerator
    settings.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomic(settings.path, yaml.safe_dump(data, sort_keys=False).encode())


def with_location(settings: Settings, name: str, path: str) -> Settings:
    """The settings with one more configured location."""
    return replace(settings, locations={**settings.locations, name: path})


def _damaged(path: Path, reason: str) -> Damaged:
    return Damaged(
        f"The settings file {path} cannot be read: {reason}",
        hint="mend the file, or move it away to start with defaults",
    )
