"""`lume attach`: which viewer it starts, and how that is told where to look.

The viewers are scripts that write down what they were given.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.lume import Lume
from tests.system.harness import Server


@pytest.fixture(scope="module")
def screens(server: Server) -> Iterator[dict[str, dict[str, Any]]]:
    """Two machines with a screen, as the API shows them."""
    names = ("one", "two")
    for name in names:
        server.create(name, image=None)
    yield {name: server.run(name) for name in names}
    for name in names:
        server.call("DELETE", f"/vms/{name}", 200)


def password_of(vm: dict[str, Any]) -> str:
    return str(vm["vncUrl"].removeprefix("vnc://:").partition("@")[0])


def desk(server: Server, folder: Path, viewer: str, then: str = "exec sleep 5") -> Lume:
    """Commands on a desktop that has this viewer only."""
    script = folder / viewer
    script.write_text(
        "#!/bin/sh\nPATH=/usr/bin:/bin\n"
        f'{{ echo "$@"; echo "${{VNC_PASSWORD-}}"; cat; }} > {folder}/told.new\n'
        f"mv {folder}/told.new {folder}/told\necho $$ > {folder}/pid\n{then}\n"
    )
    script.chmod(0o755)
    return Lume(server.home, {"PATH": str(folder), "DISPLAY": ":99", "TMPDIR": str(folder)})


def read_told(folder: Path) -> list[str]:
    """What the viewer was given: its arguments, the password in its environment, its input."""
    give_up_at = time.monotonic() + 10
    while not (folder / "told").exists():
        assert time.monotonic() < give_up_at
        time.sleep(0.02)
    return (folder / "told").read_text().splitlines()


def test_remote_viewer_reads_where_and_the_password(
    server: Server, screens: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    desk(server, tmp_path, "remote-viewer")("attach", "two")
    vm = screens["two"]
    assert read_told(tmp_path) == [
        *("-", "", "[virt-viewer]", "type=vnc", "host=127.0.0.1", f"port={vm['vncPort']}"),
        *(f"password={password_of(vm)}", "title=two"),
    ]
    # It outlives the command, and nothing else is left.
    os.kill(int((tmp_path / "pid").read_text()), 15)
    assert {path.name for path in tmp_path.iterdir()} == {"remote-viewer", "told", "pid"}


@pytest.mark.parametrize(("viewer", "between"), [("vncviewer", "::"), ("gvncviewer", ":")])
def test_other_viewers_are_led_to_the_same_machine(
    server: Server, screens: dict[str, dict[str, Any]], tmp_path: Path, viewer: str, between: str
) -> None:
    told = desk(server, tmp_path, viewer, then="exit 0").run("attach", "two").stderr
    assert "lume get two" in told
    vm = screens["two"]
    # gvncviewer takes a display, not a port.
    number = vm["vncPort"] - (5900 if between == ":" else 0)
    assert read_told(tmp_path) == [f"127.0.0.1{between}{number}", password_of(vm)]


def test_a_viewer_that_cannot_open_its_window_is_told_and_leaves_nothing(
    server: Server, screens: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    del screens
    lume = desk(server, tmp_path, "remote-viewer", then="exit 3")
    told = lume.run("attach", "one", status=1).stderr
    assert "remote-viewer ended at once with status 3" in told
    read_told(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"remote-viewer", "told", "pid"}


def test_without_a_viewer_or_a_desktop_the_url_is_told(
    server: Server, screens: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    bare = Lume(server.home, {"PATH": str(tmp_path), "DISPLAY": ":99"})
    ended = bare.run("attach", "one", status=1)
    assert ended.stdout.strip() == screens["one"]["vncUrl"]
    assert "apt install virt-viewer" in ended.stderr
    desk(server, tmp_path, "remote-viewer")
    away = Lume(server.home, {"PATH": str(tmp_path), "DISPLAY": "", "WAYLAND_DISPLAY": ""})
    ended = away.run("attach", "one", status=1)
    assert ended.stdout.strip() == screens["one"]["vncUrl"]
    assert "no desktop" in ended.stderr
    assert not (tmp_path / "told").exists()


def test_a_machine_without_a_screen_is_told(server: Server, lume: Lume) -> None:
    server.create("dark", image=None)
    assert "it is stopped" in lume.run("attach", "dark", status=1).stderr
