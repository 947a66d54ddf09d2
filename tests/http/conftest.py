"""The ASGI application over the real engine, with a fake driver under it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
from blockbuster import blockbuster_ctx
from fastapi import FastAPI

from lumed.http.app import build_app
from lumed.http.guard import Guard, Rules
from lumed.images.local import BuiltImage, Builtin, ImageCache
from lumed.model.host import Accelerator
from lumed.model.vm import Architecture
from lumed.osproc import is_alive, send_signal
from lumed.service.local import LocalEngine, start_engine
from lumed.settings import read_settings
from lumed.store.disk import create_empty
from lumed.store.layout import Home
from lumed.units import MIB
from tests.doubles.fake_driver import FakeDriver

Client = httpx.AsyncClient


async def build_blank(directory: Path, report: Callable[[str], None]) -> BuiltImage:
    """An image like tiny, without a system in it."""
    report("building")
    await create_empty(directory / "disk.qcow2", 64 * MIB)
    for name in ("vmlinuz", "initramfs"):
        (directory / name).touch()
    return BuiltImage(directory / "disk.qcow2", directory / "vmlinuz", directory / "initramfs")


async def software(_: Architecture) -> Accelerator:
    """The accelerator of the fake host."""
    return Accelerator("tcg", "tests have no machine")


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[None]:
    """A blocking call of lumed in the event loop fails the test.

    Allowed is what waits for no device: /proc is the kernel's memory, whether a program is
    installed takes a few microseconds, less than a thread, and a log line goes no further than
    the page cache.
    """
    allowed = (
        ("lumed/osproc.py", ("find_process", "boot_id", "get_program")),
        ("lumed/machine/qemu/virtiofs.py", ("find_virtiofsd",)),
        ("lumed/log.py", ("_write", "exception")),
    )
    with blockbuster_ctx("lumed") as blocker:
        for call in blocker.functions.values():
            for file, functions in allowed:
                call.can_block_in(file, functions)
        yield


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A prepared home."""
    home = Home(tmp_path / "home")
    home.prepare()
    return home


@pytest.fixture
def driver() -> FakeDriver:
    """The driver under the engine."""
    return FakeDriver()


@contextlib.asynccontextmanager
async def start_fake_engine(home: Home, driver: FakeDriver) -> AsyncIterator[LocalEngine]:
    """A real engine, as a server of that home starts it; its machines stay when it ends."""
    images = ImageCache(home.cache / "images", {"tiny": Builtin("1", build_blank)})
    settings = await asyncio.to_thread(read_settings, home.root / "config.yaml")
    async with start_engine(home, settings, driver, images, software) as engine:
        yield engine


@pytest.fixture
async def engine(home: Home, driver: FakeDriver) -> AsyncIterator[LocalEngine]:
    """A real engine; its fake machines are ended at the end."""
    async with start_fake_engine(home, driver) as engine:
        yield engine
    end_machines(driver)


def end_machines(driver: FakeDriver) -> None:
    """Kill every machine that a driver has started."""
    for machine in driver.machines:
        if is_alive(machine.process):
            send_signal(machine.process, signal.SIGKILL)


def connect(
    app: FastAPI, rules: Rules | None = None, *, url: str = "http://localhost:7777"
) -> Client:
    """A client of an application, as a listener with these rules has it."""
    guard = Guard(app, rules or Rules())
    return Client(transport=httpx.ASGITransport(app=guard), base_url=url)


@pytest.fixture
async def client(engine: LocalEngine) -> AsyncIterator[Client]:
    """A client of the application over `engine`."""
    async with connect(build_app(engine)) as client:
        yield client
