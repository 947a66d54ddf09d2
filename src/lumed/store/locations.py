"""Storage locations: names for folders that hold VMs."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lumed.errors import InvalidField, NotFound
from lumed.files import expand_path, write_json
from lumed.settings import BUILTIN_LOCATIONS, Settings
from lumed.store.layout import Home


class Locations:
    """Every place where VMs of this home may be: built-in, configured, or named by a path."""

    def __init__(self, home: Home, settings: Settings) -> None:
        self._home = home
        self._named = {name: home.location(name) for name in BUILTIN_LOCATIONS}
        self._named |= {name: Path(path) for name, path in settings.locations.items()}
        self._default = settings.default_location
        self._paths = _read_paths(home.seen_paths)

    @property
    def default(self) -> str:
        """The name of the location that a request without `storage` means."""
        return self._default

    def named(self) -> dict[str, Path]:
        """All named locations."""
        return dict(self._named)

    def every(self) -> list[tuple[str, Path]]:
        """All locations, named ones first; one that was given by path is its own name."""
        places = list(self._named.items())
        known = {path for _, path in places}
        places += [(str(path), path) for path in self._paths if path not in known]
        return places

    def get(self, storage: str | None) -> tuple[str, Path]:
        """The location a request means: None is the default.

        Raises InvalidField that lists the known names.
        """
        if storage is None:
            storage = self._default
        if storage in self._named:
            return storage, self._named[storage]
        reason = f"is not known; known are {', '.join(sorted(self._named))}"
        if "/" in storage:
            try:
                path = Path(os.path.normpath(expand_path(storage)))
            except ValueError as error:
                reason = str(error)
            else:
                names = [name for name, place in self._named.items() if place == path]
                return (names[0] if names else str(path)), path
        reason = f"{storage!r:.80} {reason}"
        raise InvalidField(
            f"storage: {reason}",
            hint="add it with POST /lume/config/locations, or give an absolute path",
            fields={"storage": reason},
        )

    def find_named(self, name: str) -> Path:
        """The folder of a named location. Raises NotFound."""
        if name not in self._named:
            raise NotFound(f"VM location not found: {name}")
        return self._named[name]

    def remember(self, path: Path) -> None:
        """Keep a location that was given by path, before the first VM is made in it."""
        if path not in self._named.values() and path not in self._paths:
            self._paths.append(path)
            write_json(self._home.seen_paths, {"paths": [str(p) for p in self._paths]})


def _read_paths(file: Path) -> list[Path]:
    try:
        data = json.loads(file.read_bytes())
        return [Path(path) for path in data["paths"] if Path(path).is_absolute()]
    except (OSError, ValueError, KeyError, TypeError):
        return []
