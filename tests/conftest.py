"""What all tests share: a folder and processes that are gone afterwards, however it ends.

With pytest-xdist's workers (scripts/test has two) this holds for the session, and `alone` lets a
test have the machine to itself for a while.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import hypothesis
import pytest

_CACHE = "LUMED_TEST_CACHE"
# A worker takes a file at a time, and the next one already with the last two tests of the one
# before. So the kills (test_restart.py) follow the Debian guest, whose end need not wait for them.
_SLOWEST = ("test_debian_guest.py", "test_tiny.py", "test_restart.py", "test_life.py")
_ORDER = ("system", "cli", "registry", "qemu", "server")
_REAPER = Path(__file__).parent / "reaper.py"


# How long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile("lumed", deadline=None)
hypothesis.settings.load_profile("lumed")


def pytest_configure(config: pytest.Config) -> None:
    """Give the session a folder and a mark, and start the reaper that sweeps both."""
    if hasattr(config, "workerinput"):
        # Instead of "popen-gw0", see below.
        session = Path(config.option.basetemp).parent
        config.option.basetemp = session / config.workerinput["workerid"]
        return
    if config.option.collectonly:
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
    """Slow files first: with two workers, the last ones then end at about the same time."""
    items.sort(key=_rank)  # stable


def _rank(item: pytest.Item) -> int:
    if item.path.name in _SLOWEST:
        return _SLOWEST.index(item.path.name)
    folder = item.path.parent.name
    return len(_SLOWEST) + (_ORDER.index(folder) if folder in _ORDER else len(_ORDER))


@pytest.fixture(scope="session")
def image_cache() -> Path:
    """The images of the session: tiny is made once, by the first test that needs it.

    One folder for all of pytest-xdist's workers, as servers may share one.
    """
    return Path(os.environ[_CACHE])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test runs beside those of the other workers, unless one of them is `alone`."""
    with _lock("turn") as turn, _lock("tests") as tests:
        item.stash[_LOCKS] = turn, tests
        _join(turn, tests)
        return (yield)


def _join(turn: int, tests: int) -> None:
    fcntl.flock(turn, fcntl.LOCK_EX)
    fcntl.flock(tests, fcntl.LOCK_SH)
    fcntl.flock(turn, fcntl.LOCK_UN)


@pytest.fixture
def alone(request: pytest.FixtureRequest) -> Callable[[], AbstractContextManager[None]]:
    """For what must be done against the clock: `with alone():` holds up all other tests.

    Those that run at its begin are waited for, unless they `give_way`.
    """

    @contextlib.contextmanager
    def hold_up() -> Iterator[None]:
        turn, tests = request.node.stash[_LOCKS]
        # Ours first: another one may be waiting to be alone, too.
        fcntl.flock(tests, fcntl.LOCK_UN)
        fcntl.flock(turn, fcntl.LOCK_EX)
        fcntl.flock(tests, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(tests, fcntl.LOCK_SH)
            fcntl.flock(turn, fcntl.LOCK_UN)

    return hold_up


@pytest.fixture
def give_way(request: pytest.FixtureRequest) -> Callable[[], None]:
    """For a long test: called now and then, it lets one that waits to be `alone` go first."""

    def pause() -> None:
        turn, tests = request.node.stash[_LOCKS]
        fcntl.flock(tests, fcntl.LOCK_UN)
        _join(turn, tests)

    return pause


@contextlib.contextmanager
def _lock(name: str) -> Iterator[int]:
    fd = os.open(Path(os.environ[_CACHE]).with_name(f"{name}.lock"), os.O_RDWR | os.O_CREAT)
    try:
        yield fd
    finally:
        os.close(fd)


_LOCKS = pytest.StashKey[tuple[int, int]]()
_REAPER_KEY = pytest.StashKey[subprocess.Popen[bytes]]()
