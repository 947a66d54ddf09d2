"""A real server, and `lume` commands that find it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.lume import Lume
from tests.system.harness import Server, running_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, image_cache: Path) -> Iterator[Server]:
    """A server of a home, with tiny guests."""
    with running_server(tmp_path_factory.mktemp("cli") / "home", image_cache) as server:
        yield server


@pytest.fixture
def lume(server: Server) -> Lume:
    """Commands for that home."""
    return Lume(server.home)
