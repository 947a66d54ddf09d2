"""The names under which cached images are known: one small file for each name.

    <directory>/<hash of the name>.json     {"name": …, "image": <id>}, replaced atomically

A name may move to another image, as a tag does; an image may have several names, or none.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from lumed.files import read_json_object, write_json


class ImageNames:
    """The names in one directory, which several servers may share. All of it blocks briefly."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def find(self, name: str) -> str | None:
        """The id of the image of that name."""
        known = _read(self._file(name))
        return known[1] if known is not None and known[0] == name else None

    def read_all(self) -> dict[str, str]:
        """Every name with the id of its image."""
        return dict(filter(None, map(_read, self._directory.glob("*.json"))))

    def write(self, name: str, image_id: str) -> None:
        """Give an image a name, taking it from another. Raises NoSpace."""
        if self.find(name) != image_id:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_json(self._file(name), {"name": name, "image": image_id})

    def remove(self, name: str) -> None:
        """Forget a name."""
        self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self._directory / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"


def _read(file: Path) -> tuple[str, str] | None:
    try:
        content = read_json_object(file)
        return str(content["name"]), str(content["image"])
    except (OSError, ValueError, KeyError):
        return None
