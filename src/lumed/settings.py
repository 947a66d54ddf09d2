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
from lumed.files import expand_path, write_atomic
from lumed.naming import check_location_name

DEFAULT_IMAGE = "debian:12"
BUILTIN_LOCATIONS = ("home", "ssd", "hdd", "nvme", "ephemeral")


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a home.

    locations maps names to absolute paths and holds only what was configured; the built-in
    ones (`home`, `ssd` and so on) are folders of the home until they appear here.
    insecure_registries ("host:port") may be spoken to without TLS; it is only read, never written.
    mirrors maps names of the catalog's mirrors to other URLs, for instance of a local copy.
    """

    default_location: str = "home"
    locations: dict[str, str] = field(default_factory=dict)
    cache_directory: str | None = None
    caching_enabled: bool = True
    default_image: str = DEFAULT_IMAGE
    registry: str = "ghcr.io"
    organization: str = "trycua"
    accelerator: str | None = None
    insecure_registries: tuple[str, ...] = ()
    mirrors: dict[str, str] = field(default_factory=dict)
    path: Path | None = None


def settings_path(home: Path, *, named: bool) -> Path:
    """Where the settings of a home are; `named` is True if the user named the home."""
    if named:
        return home / "config.yaml"
    config_home = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(config_home) / "lume" / "config.yaml"


def catalog_path(settings: Path) -> Path:
    """Where the user's additions to the image catalog are: beside the settings."""
    return settings.with_name("images.yaml")


def read_settings(path: Path) -> Settings:
    """The settings in a file, defaults if there is none.

    Raises Damaged with the reason if the file cannot be understood: guessing where VMs are
    would hide them.
    """
    data = _read_mapping(path)
    try:
        return _from_yaml(data, path)
    except (TypeError, KeyError, ValueError, AttributeError, InvalidField) as error:
        raise _damaged(path, str(error)) from error


def _read_mapping(path: Path) -> dict[str, object]:
    """What the file holds, empty if there is none. Raises Damaged."""
    try:
        data = yaml.safe_load(path.read_bytes())
    except FileNotFoundError:
        return {}
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise _damaged(path, f"{line}{error.problem}") from error
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: a date such as 2026-99-99, which the parser takes for one and cannot make.
        raise _damaged(path, str(error)) from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise _damaged(path, "it is no mapping")
    return data


def _from_yaml(data: dict[str, object], path: Path) -> Settings:
    locations: dict[str, str] = {}
    for entry in cast("list[dict[str, object]]", data.get("vmLocations") or []):
        name = check_location_name(entry["name"])
        locations[name] = _directory(entry["path"], f"the path of {name}")
    default = str(data.get("defaultLocationName") or "home")
    if default not in locations and default not in BUILTIN_LOCATIONS:
        raise ValueError(f"defaultLocationName is {default!r}, which vmLocations does not name")
    registry = cast("dict[str, dict[str, object]]", data.get("registry") or {}).get("ghcr") or {}
    cache = data.get("cacheDirectory")
    accelerator = data.get("accelerator")
    return Settings(
        default_location=default,
        locations=locations,
        cache_directory=None if cache is None else _directory(cache, "cacheDirectory"),
        caching_enabled=bool(data.get("cachingEnabled", True)),
        default_image=str(data.get("defaultImage") or DEFAULT_IMAGE),
        registry=str(registry.get("registry") or "ghcr.io"),
        organization=str(registry.get("organization") or "trycua"),
        accelerator=None if accelerator is None else str(accelerator),
        insecure_registries=tuple(
            map(str, cast("list[object]", data.get("insecureRegistries") or []))
        ),
        mirrors=_mirrors(data.get("mirrors")),
        path=path,
    )


def _mirrors(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise TypeError("mirrors is no mapping of names to URLs")
    for name, url in value.items():
        if not str(url).startswith(("http://", "https://")):
            raise ValueError(f"the mirror {name} is {url!r:.100}, which is no http or https URL")
    return {str(name): str(url) for name, url in value.items()}


def _directory(value: object, what: str) -> str:
    try:
        return str(expand_path(str(value)))
    except ValueError as error:
        raise ValueError(f"{what}, {value!r:.100}, {error}") from error


def write_settings(settings: Settings) -> None:
    """Write the settings back to the file they came from.

    Keys that lumed has no use for (Lume's telemetry, other registries) stay as they are in the
    file. Raises Damaged rather than overwrite what cannot be read.
    """
    if settings.path is None:
        raise ValueError("settings without a file")
    data = _read_mapping(settings.path)
    data |= {
        "defaultLocationName": settings.default_location,
        "cachingEnabled": settings.caching_enabled,
        "defaultImage": settings.default_image,
        "vmLocations": [{"name": n, "path": p} for n, p in sorted(settings.locations.items())],
        "registry": _merged_registry(data.get("registry"), settings),
    }
    optional = {
        "cacheDirectory": settings.cache_directory,
        "accelerator": settings.accelerator,
    }
    data |= {key: value for key, value in optional.items() if value is not None}
    settings.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # The file itself, where the name is a link to one (as tools for dot files make it).
    write_atomic(settings.path.resolve(), yaml.safe_dump(data, sort_keys=False).encode())


def _merged_registry(old: object, settings: Settings) -> dict[str, object]:
    registry: dict[str, object] = dict(old) if isinstance(old, dict) else {}
    ghcr = registry.get("ghcr")
    registry["ghcr"] = {
        **(ghcr if isinstance(ghcr, dict) else {}),
        "registry": settings.registry,
        "organization": settings.organization,
    }
    return {"type": "ghcr", **registry}


def with_location(settings: Settings, name: str, path: str) -> Settings:
    """The settings with one more configured location."""
    return replace(settings, locations={**settings.locations, name: path})


def _damaged(path: Path, reason: str) -> Damaged:
    return Damaged(
        f"The settings file {path} cannot be read: {reason}",
        hint="mend the file, or move it away to start with defaults",
    )
