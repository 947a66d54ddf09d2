"""Shared directories in a real guest, by both transports, as root and as another user."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import pwd
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import lumed
from lumed.errors import InvalidField
from lumed.guest.seed import Seed, SeedShare, make_seed
from lumed.machine.qemu.virtiofs import Virtiofsd, VirtiofsdFlavour
from lumed.machine.shares import (
    FIRST_TAG,
    ShareDevice,
    ShareSupport,
    find_share_support,
    plan_shares,
    start_share,
    virtiofsd_argv,
)
from lumed.model.run import SharedDirectory, ShareTransport
from lumed.osproc import find_process, is_alive, run_tool, wait_gone
from tests.qemu import mini
from tests.qemu.mini import MiniKernel, run_guest, unpack_kernel

NINEP = ShareSupport(None)
# Mounts what the seed says, as the lines of its meta-data say it, then tries to write.
GUEST_SCRIPT = """
mkdir /seed; mount -t iso9660 -o ro /dev/vda /seed
sed -n 's/^- \\["//; s/", "/ /gp' /seed/meta-data | while read -r tag path type options _; do
    mkdir -p "$path"; mount -t "$type" -o "${options%,nofail}" "$tag" "$path"
    echo "read $path $(cat "$path/host.txt")"
    if echo "from the guest" > "$path/guest.txt"; then
        chmod 750 "$path/guest.txt"; echo "wrote $path"
    fi
    rm "$path/host.txt" || echo "kept $path"
    if [ -d "$path/below" ] && echo x > "$path/below/x"; then echo "wrote below $path"; fi
    umount "$path"
done
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> MiniKernel:
    return unpack_kernel(tmp_path_factory.mktemp("kernel"))


@pytest.fixture
def directories(tmp_path: Path) -> Iterator[tuple[SharedDirectory, ...]]:
    """Those of make_directories; as root, with a file system mounted below the last."""
    made = make_directories(tmp_path)
    below = Path(made[-1].host_path) / "below"
    if os.geteuid() != 0:
        yield made
        return
    subprocess.run(["mount", "-t", "tmpfs", "none", below], check=True, timeout=10)
    try:
        yield made
        assert not list(below.iterdir())
    finally:
        subprocess.run(["umount", below], check=True, timeout=10)


def make_directories(folder: Path) -> tuple[SharedDirectory, ...]:
    """One to write and two to read, with names that could be misread on a command line."""
    paths = [folder / name for name in ("rw, \\x=y", "ro", "lie")]
    for path in paths:
        (path / "below").mkdir(parents=True)
        (path / "host.txt").write_text(f"hello from {path.name[:2]}")
    return plan_shares(zip(paths, (False, True, True), strict=True))


def tell(directories: Sequence[SharedDirectory], transport: ShareTransport) -> bytes:
    """A seed for a guest that has these shares and is told that the last may be written to.

    So its mount option does not protect that one; only the host does.
    """
    told = [*directories[:-1], dataclasses.replace(directories[-1], read_only=False)]
    shares = tuple(SeedShare(directory, transport) for directory in told)
    return make_seed(Seed("id", "mini", shares=shares))


async def run_with_shares(
    kernel: MiniKernel,
    folder: Path,
    directories: Sequence[SharedDirectory],
    support: ShareSupport,
) -> str:
    """Boot a guest with these shares; returns what it printed. Helpers are gone afterwards."""
    log = folder / "helpers.log"
    devices: list[ShareDevice] = []
    try:
        for index, directory in enumerate(directories):
            devices.append(
                await start_share(directory, index, support, runtime_dir=folder, log=log)
            )
        seed = folder / "seed.iso"
        seed.write_bytes(tell(directories, support.transport))
        argv = ["-drive", f"file={seed},format=raw,if=virtio,readonly=on"]
        argv += [word for device in devices for word in device.argv]
        fds = [fd for device in devices for fd in device.pass_fds]
        console = await asyncio.to_thread(
            run_guest, kernel, GUEST_SCRIPT, folder, argv=argv, pass_fds=fds
        )
    finally:
        for device in devices:
            device.close()
    for device in devices:
        if device.helper is not None:
            assert await wait_gone(device.helper, 5), "a helper outlived its machine"
    assert not list(folder.glob("*.sock"))
    return console + (log.read_text() if log.exists() else "")


def check_outcome(console: str, directories: Sequence[SharedDirectory]) -> None:
    writable, *others = (Path(directory.host_path) for directory in directories)
    assert "read /mnt/shared/rw-x-y hello from rw" in console
    assert "wrote /mnt/shared/rw-x-y" in console
    assert "wrote below /mnt/shared/rw-x-y" in console
    assert (writable / "guest.txt").read_text() == "from the guest\n"
    assert not (writable / "host.txt").exists()
    status = (writable / "guest.txt").stat()
    assert status.st_mode & 0o777 == 0o750
    assert status.st_uid == writable.stat().st_uid
    for path in others:
        assert f"read /mnt/shared/{path.name} hello from {path.name[:2]}" in console
        assert f"kept /mnt/shared/{path.name}" in console
        assert f"wrote /mnt/shared/{path.name}" not in console
        assert f"wrote below /mnt/shared/{path.name}" not in console
        assert {entry.name for entry in path.iterdir()} == {"host.txt", "below"}


@pytest.mark.parametrize("transport", list(ShareTransport))
async def test_a_guest_reads_all_and_writes_only_where_it_may(
    transport: ShareTransport,
    kernel: MiniKernel,
    directories: tuple[SharedDirectory, ...],
    tmp_path: Path,
) -> None:
    support = NINEP if transport is ShareTransport.NINEP else await find_share_support()
    if support.transport is not transport:
        pytest.skip(f"only 9p here: {support.problem}")
    console = await run_with_shares(kernel, tmp_path, directories, support)
    check_outcome(console, directories)


@pytest.fixture
def another_user() -> Iterator[pwd.struct_passwd]:
    """A new user with a home and subordinate ids, removed afterwards with its files.

    The session's mark in its comment lets the reaper do so as well.
    """
    name = f"lumed-{secrets.token_hex(4)}"
    mark = f"LUMED_TEST_SESSION={os.environ['LUMED_TEST_SESSION']}"
    argv = ["useradd", "--comment", mark, "--create-home", "--base-dir", "/tmp", name]
    subprocess.run(argv, check=True, timeout=20)
    try:
        # In a second group, as people are: virtiofsd has to give it up.
        subprocess.run(["usermod", "--append", "--groups", "audio", name], check=True, timeout=20)
        yield pwd.getpwnam(name)
    finally:
        subprocess.run(["userdel", "--force", "--remove", name], check=True, timeout=20)


# Runs as that user with the system's Python, which may not have lumed's dependencies; the
# sources lie in its home, since it may not enter ours.
_AS_USER = """
import asyncio, sys
from pathlib import Path
home = Path(sys.argv[1])
sys.path[:0] = [str(home / "lib")]
import mini
from lumed.machine.shares import find_share_support, plan_shares, start_share
async def main():
    support = await find_share_support()
    print("transport", support.transport, support.problem)
    named = [(home / "rw, \\\\x=y", False), (home / "ro", True), (home / "lie", True)]
    shares = plan_shares(named)
    devices = [
        await start_share(share, index, support, runtime_dir=home, log=home / "helpers.log")
        for index, share in enumerate(shares)
    ]
    kernel = mini.MiniKernel(home / "kernel", home / "modules")
    argv = ["-drive", f"file={home}/seed.iso,format=raw,if=virtio,readonly=on"]
    argv += [word for device in devices for word in device.argv]
    fds = [fd for device in devices for fd in device.pass_fds]
    script = (home / "script").read_text()
    print(await asyncio.to_thread(mini.run_guest, kernel, script, home, argv=argv, pass_fds=fds))
    for device in devices:
        device.close()
asyncio.run(main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a user, which needs root")
@pytest.mark.skipif(shutil.which("newuidmap") is None, reason="needs the package uidmap")
async def test_a_server_without_root_shares_too_and_owns_what_the_guest_writes(
    kernel: MiniKernel, another_user: pwd.struct_passwd
) -> None:
    home = Path(another_user.pw_dir)
    directories = make_directories(home)
    (home / "seed.iso").write_bytes(tell(directories, ShareTransport.VIRTIOFS))
    (home / "script").write_text(GUEST_SCRIPT)
    shutil.copytree(Path(lumed.__file__).parent, home / "lib" / "lumed")
    shutil.copy(mini.__file__, home / "lib")
    shutil.copy(kernel.kernel, home / "kernel")
    shutil.copytree(kernel.modules, home / "modules")
    name = another_user.pw_name
    await run_tool(["chown", "-R", f"{name}:", home], timeout_s=20)
    # Its errors belong to the console that is shown when this fails.
    argv = ["runuser", "-u", name, "--", "sh", "-c", 'cd / && exec "$@" 2>&1', "sh"]
    argv += ["/usr/bin/python3", "-B", "-c", _AS_USER, os.fspath(home)]
    console = (await run_tool(argv, timeout_s=100)).decode(errors="replace")
    assert "transport virtiofs" in console
    check_outcome(console, directories)
    assert (home / "rw, \\x=y" / "guest.txt").stat().st_uid == another_user.pw_uid


async def test_a_helper_whose_machine_never_came_ends(
    directories: tuple[SharedDirectory, ...], tmp_path: Path
) -> None:
    support = await find_share_support()
    for index, directory in enumerate(directories):
        device = await start_share(
            directory, index, support, runtime_dir=tmp_path, log=tmp_path / "log"
        )
        assert device.helper is not None
        assert is_alive(device.helper)
        device.close()
        assert await wait_gone(device.helper, 5)


# Prints the helper's pid, then waits to be killed.
_STARTS_A_HELPER = """
import asyncio, sys
from pathlib import Path
from lumed.machine.shares import find_share_support, plan_shares, start_share
async def main():
    folder = Path(sys.argv[1])
    (share,) = plan_shares([(folder, sys.argv[2] == "ro")])
    support = await find_share_support()
    device = await start_share(share, 0, support, runtime_dir=folder, log=folder / "log")
    print(device.helper.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


@pytest.mark.parametrize("mode", ["rw", "ro"])
async def test_a_helper_ends_when_the_server_is_killed_before_the_machine_started(
    mode: str, tmp_path: Path
) -> None:
    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", _STARTS_A_HELPER, tmp_path, mode],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
        )

    server = await asyncio.to_thread(start)
    with server:
        try:
            assert server.stdout is not None
            pid = int(await asyncio.to_thread(server.stdout.readline))
            helper = find_process(pid)
            assert helper is not None
        finally:
            server.kill()
    assert await wait_gone(helper, 5)


def test_the_first_share_has_lumes_tag_and_the_others_numbers() -> None:
    shares = plan_shares([(Path("/a"), False), (Path("/b"), True), (Path("/c"), False)])
    assert [share.tag for share in shares] == [FIRST_TAG, "share-2", "share-3"]
    assert [share.read_only for share in shares] == [False, True, False]
    assert len(FIRST_TAG.encode()) < 32


def test_the_rust_virtiofsd_gets_its_own_options() -> None:
    rust = Virtiofsd(Path("/usr/libexec/virtiofsd"), VirtiofsdFlavour.RUST, "1.10.0")
    share = SharedDirectory("/home/me/a,b", False, "t")
    assert virtiofsd_argv(rust, share, 7) == [
        "/usr/libexec/virtiofsd",
        "--fd=7",
        "--shared-dir=/home/me/a,b",
    ]


async def test_a_path_that_would_end_a_line_is_refused(tmp_path: Path) -> None:
    share = SharedDirectory("/home/me/a\nb", False, "t")
    with pytest.raises(InvalidField, match="hostPath"):
        await start_share(share, 0, NINEP, runtime_dir=tmp_path, log=tmp_path / "log")
