"""Where the server of a home listens."""

from __future__ import annotations

import os
from pathlib import Path

from lumed.files import read_json_object
from lumed.store.layout import Home


def find_home(given: str | Path | None = None) -> tuple[Home, bool]:
    """The home (the given one, else LUME_HOME, else ~/.lume), and whether it was named."""
    named = given or os.environ.get("LUME_HOME") or None
    root = Path(named) if named else Path.home() / ".lume"
    return Home(Path(os.path.abspath(root.expanduser()))), bool(named)  # noqa: PTH100


def find_socket(home: Home) -> Path:
    """The unix socket on which a server of that home listens, if one runs."""
    try:
        return Path(str(read_json_object(home.server_json)["socket"]))
    except (OSError, ValueError, KeyError):
        return home.socket
