"""What all tests share: a folder and processes that are gone afterwards, however it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import pytest

_REAPER = Path(__file__).parent / "reaper.py"


def pytest_configure(config: pytest.Config) -> None:
    """Give the session a folder and a mark, and start the reaper that sweeps both."""
    if hasattr(config, "workerinput") or config.option.collectonly:
        return
    if config.option.basetemp is None:
        config.option.basetemp = tempfile.mkdtemp(prefix="lumed-test-")
    mark = f"LUMED_TEST_SESSION={uuid.uuid4()}"
    reaper = subprocess.Popen(
        [sys.executable, "-I", str(_REAPER), mark, str(config.option.basetemp)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    config.stash[_REAPER_KEY] = reaper
    # Inherited by every process that a test starts, at whatever distance.
    name, _, value = mark.partition("=")
    os.environ[name] = value


def pytest_unconfigure(config: pytest.Config) -> None:
    """Let the reaper sweep, and wait until it has."""
    reaper = config.stash.get(_REAPER_KEY, None)
    if reaper is not None and reaper.stdin is not None:
        reaper.stdin.close()
        reaper.wait(30)


@pytest.fixture(scope="session")
def image_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of the session: tiny is made once, by the first test that needs it."""
    return tmp_path_factory.mktemp("cache")


_REAPER_KEY = pytest.StashKey[subprocess.Popen[bytes]]()
