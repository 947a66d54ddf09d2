"""A build that ends early: cancelled, killed, or by its own fault. Nothing of it stays."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lumed.claim import find_holder
from lumed.errors import MissingDependency, ToolFailed
from lumed.images.build import build_debian, plan_recipe

# Ends with the first step that takes long: nothing is installed in these tests.
STEP = "Fetching package lists"

BUILD = """
import asyncio, sys
from pathlib import Path
from lumed.images.build import build_debian, plan_recipe
recipe = plan_recipe("debian:12")
asyncio.run(build_debian(recipe, Path(sys.argv[1]), lambda step: print(step, flush=True)))
"""


def wait_let_go(disk: Path) -> None:
    """Every process of a build holds the disk's descriptor; wait until none is left."""
    give_up_at = time.monotonic() + 30
    while find_holder(disk) is not None:
        assert time.monotonic() < give_up_at, "a process of the build lives on"
        time.sleep(0.02)


async def test_a_cancelled_build_leaves_no_process(tmp_path: Path) -> None:
    started = asyncio.Event()
    loop = asyncio.get_running_loop()

    def report(step: str) -> None:
        if step == STEP:
            loop.call_soon_threadsafe(started.set)

    task = asyncio.create_task(build_debian(plan_recipe("debian:12"), tmp_path, report))
    async with asyncio.timeout(120):
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    wait_let_go(tmp_path / "disk")
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]


def test_a_build_ends_with_the_server_that_is_killed(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        assert any(line.strip() == STEP for line in process.stdout)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    wait_let_go(tmp_path / "disk")


async def test_a_package_that_does_not_exist_is_named(tmp_path: Path) -> None:
    recipe = plan_recipe("debian:12", ["no-such-package"])
    with pytest.raises(ToolFailed, match="no-such-package"):
        await build_debian(recipe, tmp_path, lambda _: None)
    wait_let_go(tmp_path / "disk")


async def test_without_mmdebstrap_the_line_that_installs_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependency, match="mmdebstrap") as caught:
        await build_debian(plan_recipe("debian:12"), tmp_path, lambda _: None)
    assert caught.value.hint == "sudo apt-get install mmdebstrap"
    assert list(tmp_path.iterdir()) == []
