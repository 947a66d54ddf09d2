"""What all tests share: a folder and processes that are gone afterwards, however it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import hypothesis
import pytest

_CACHE = "LUMED_TEST_CACHE"
_ORDER = ("system", "registry", "server", "qemu")
_SPREAD = ("test_restart.py", "test_life.py", "test_faults.py", "test_clone.py")
_REAPER = Path(__file__).parent / "reaper.py"


# How long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile("lumed", deadline=None)
hypothesis.settings.load_profile("lumed")


def pytest_configure(config: pytest.Config) -> None:
    """Give the session a folder and a mark, and start the reaper that sweeps both."""
    if hasattr(config, "workerinput") or config.option.collectonly:
        return
    if config.option.basetemp is None:
        # Short: sockets below it must stay in their homes (unix(7): 108 bytes).
        config.option.basetemp = tempfile.mkdtemp(prefix="lt")
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
    os.environ[_CACHE] = tempfile.mkdtemp(prefix="cache-", dir=config.option.basetemp)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Let the reaper sweep, and wait until it has."""
    reaper = config.stash.get(_REAPER_KEY, None)
    if reaper is not None and reaper.stdin is not None:
        reaper.stdin.close()
        reaper.wait(30)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, and each file's tests on one worker, where they share what is costly.

    Whole servers share nothing but the images, so their tests go wherever a worker is free.
    """
    items.sort(key=_rank)  # stable
    for item in items:
        if not str(item.path).endswith(_SPREAD):
            item.add_marker(pytest.mark.xdist_group(item.path.name))


def _rank(item: pytest.Item) -> int:
    if item.path.name == "test_debian_guest.py":
        return -1  # by far the longest single test
    folder = item.path.parent.name
    return _ORDER.index(folder) if folder in _ORDER else len(_ORDER)


@pytest.fixture(scope="session")
def image_cache() -> Path:
    """The images of the session: tiny is made once, by the first test that needs it.

    One folder for all of pytest-xdist's workers, as servers may share one.
    """
    return Path(os.environ[_CACHE])


_REAPER_KEY = pytest.StashKey[subprocess.Popen[bytes]]()
