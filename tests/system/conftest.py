"""A server for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.harness import Server, running_server


@pytest.fixture
def server(tmp_path: Path, image_cache: Path) -> Iterator[Server]:
    """A server on a home of its own."""
    with running_server(tmp_path / "home", image_cache) as server:
        yield server
