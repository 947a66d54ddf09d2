"""The promise is a rootless server, so the main path runs once as a user without privileges."""

from __future__ import annotations

import importlib.metadata
import os
import pwd
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lumed
from tests.system.harness import SMALL, Server, get_line

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the whole suite runs without root")


@pytest.fixture
def user() -> Iterator[pwd.struct_passwd]:
    """A new user; the session's mark in its comment lets the reaper remove it as well."""
    name = f"lumedtest{os.getpid()}"
    mark = f"LUMED_TEST_SESSION={os.environ['LUMED_TEST_SESSION']}"
    subprocess.run(["useradd", "-c", mark, "-d", "/nonexistent", name], check=True)
    try:
        yield pwd.getpwnam(name)
    finally:
        subprocess.run(["userdel", "-f", name], check=False)


@pytest.fixture
def playground(tmp_path: Path, user: pwd.struct_passwd) -> Path:
    """A folder of that user, reachable for it: tmp_path itself is root's alone."""
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    path = tmp_path / "u"
    path.mkdir()
    os.chown(path, user.pw_uid, user.pw_gid)
    return path


@pytest.fixture
def rootless(playground: Path, user: pwd.struct_passwd) -> Iterator[Server]:
    """A server of that user, from a copy of lumed that it can read."""
    library = playground / "lib"
    copy_library(library)
    home = playground / "home"
    command = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--init-groups"]
    command += ["--reset-env", "env", f"PYTHONPATH={library}", f"HOME={playground}"]
    command += [f"LUMED_TEST_SESSION={os.environ['LUMED_TEST_SESSION']}"]
    command += [getattr(sys, "_base_executable", sys.executable), "-m", "lumed"]
    server = Server(home, command=command)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        server.end_machines()


def copy_library(target: Path) -> None:
    """lumed and what it needs at run time, out of a .venv that others may not read."""
    shutil.copytree(Path(lumed.__file__).parent, target / "lumed")
    todo, seen = ["lumed"], set[str]()
    while todo:
        name = todo.pop()
        for line in importlib.metadata.distribution(name).requires or []:
            needed = re.match(r"[A-Za-z0-9._-]+", line)
            if needed is None or "extra ==" in line or needed[0].lower() in seen:
                continue
            try:
                found = importlib.metadata.distribution(needed[0])
            except importlib.metadata.PackageNotFoundError:
                continue  # for another platform
            seen.add(needed[0].lower())
            todo.append(needed[0])
            for file in found.files or []:
                if ".." not in file.parts and file.suffix != ".pyc":
                    (target / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(str(found.locate_file(file)), target / file)


def test_the_main_path_works_without_root(
    rootless: Server, playground: Path, user: pwd.struct_passwd
) -> None:
    share = playground / "share"
    share.mkdir()
    os.chown(share, user.pw_uid, user.pw_gid)
    (share / "hello").write_text("from the host\n")

    rootless.create("web", **SMALL)
    vm = rootless.boot("web", sharedDirectories=[{"hostPath": str(share), "readOnly": False}])
    qemu = Path(f"/proc/{rootless.machine_pid('web')}")
    assert qemu.stat().st_uid == user.pw_uid

    forwards = {f["guestPort"]: f["port"] for f in vm["forwards"]}
    lowest = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    assert forwards[22] >= lowest
    assert get_line(vm["ipAddress"], forwards[8000]).startswith("lumed tiny web")

    rootless.wait_serial("web", "lumed: mounted ")
    (mounted,) = rootless.shell("web", "ls -d /mnt/shared/*").split()
    assert rootless.shell("web", f"cat {mounted}/hello") == "from the host"
    rootless.shell("web", f"echo guest > {mounted}/reply; sync")
    assert (share / "reply").read_text() == "guest\n"
    assert (share / "reply").stat().st_uid == user.pw_uid

    # Its unix socket is for its own user, and for root.
    as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--init-groups"]
    ask = ["curl", "-sf", "--unix-socket", str(rootless.home / "run/lume.sock")]
    for command in ([*as_user, *ask], ask):
        said = subprocess.run(
            [*command, "http://localhost/lume/vms"], capture_output=True, check=True
        )
        assert b'"name":"web"' in said.stdout

    pid = rootless.machine_pid("web")
    rootless.kill()
    rootless.start()
    again = rootless.wait_for("web", lambda vm: "ipAddress" in vm, 20)
    assert again["ipAddress"] == vm["ipAddress"]
    assert rootless.machine_pid("web") == pid

    reply = rootless.call("POST", "/vms/web/update", 409, json={"cpu": 2})
    assert "running" in reply["message"]
    stopped = rootless.call("POST", "/vms/web/stop", 200)
    assert stopped["lastEnd"]["step"] == "power-button"

    reply = rootless.call("POST", "/vms/web/run", 501, json={"network": "bridged:lo"})
    assert "needs root" in reply["message"]
    rootless.call("DELETE", "/vms/web", 200)
