"""The second real guest: Debian, built from its mirror, from the first boot to an orderly end.

One build and one boot for all of it: in software emulation each takes minutes on a busy machine.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.cli.lume import Lume
from tests.system.harness import Server, running_server

pytestmark = pytest.mark.timeout(1800)
# Idle: half a minute. A machine that runs other tests meanwhile takes a multiple.
BOOT_S = 600.0
BUILD_S = 600.0
LOGIN_S = 90.0
IDENTITY = "cat /etc/machine-id; cut -d' ' -f1,2 /etc/ssh/ssh_host_ed25519_key.pub"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, image_cache: Path) -> Iterator[Server]:
    """One server for the one guest."""
    with running_server(tmp_path_factory.mktemp("debian-home") / "home", image_cache) as server:
        yield server


@contextlib.contextmanager
def logged_in(server: Server, address: str) -> Iterator[Callable[[str], str]]:
    """What runs commands in the guest, for the seed's user with the home's key.

    All over one connection: each login costs the guest two seconds.
    """
    path = server.home / "ssh.sock"
    ssh = ["ssh", "-F", "/dev/null", "-S", str(path), "-i", str(server.home / "ssh/id_ed25519")]
    for option in (
        "BatchMode=yes",
        "LogLevel=ERROR",
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/dev/null",
        f"ConnectTimeout={LOGIN_S:g}",
    ):
        ssh += ["-o", option]

    def run(command: str) -> str:
        ended = subprocess.run(
            [*ssh, f"lume@{address}", command],
            capture_output=True,
            text=True,
            timeout=LOGIN_S,
            check=False,
        )
        assert ended.returncode == 0, f"{command!r}: {ended.stdout!r} {ended.stderr!r}"
        return ended.stdout.strip()

    connection = subprocess.Popen([*ssh, "-M", "-N", f"lume@{address}"])
    try:
        give_up_at = time.monotonic() + LOGIN_S
        while not path.exists():
            assert connection.poll() is None
            assert time.monotonic() < give_up_at
            time.sleep(0.05)
        yield run
    finally:
        connection.terminate()
        connection.wait(10)


def check_ssh(server: Server, name: str, scratch: Path) -> None:
    """`lume ssh` and `lume cp` with the key, a password, and a host key that is not the VM's."""
    lume = Lume(server.home)
    assert lume.run("ssh", name, "echo told >&2; exit 7", status=7).stderr == "told\n"
    there, back = scratch / "there", scratch / "back"
    (there / "in").mkdir(parents=True)
    (there / "in" / "a file").write_bytes(bytes(range(256)) * 1000)
    lume("cp", "-r", str(there), f"{name}:")
    lume("cp", f"{name}:there/in/a file", str(back))
    assert back.read_bytes() == (there / "in" / "a file").read_bytes()

    folder = server.home / "ssh"
    known = (folder / "known_hosts").read_text()
    uuid = server.vm(name)["uuid"]
    assert [line.split()[0] for line in known.splitlines()] == [uuid]
    key, away = folder / "id_ed25519", folder / "away"
    key.rename(away)
    try:
        keys = lume("ssh", name, "cat /etc/ssh/ssh_host_*.pub").splitlines()
        assert known.split()[1:] in [line.split()[:2] for line in keys]
        refused = lume.run("ssh", "-p", "wrong", name, "id", status=255).stderr
        assert "does not let lume in" in refused
        assert "wrong" not in refused
    finally:
        away.rename(key)
    # A valid key of somebody else.
    public = (folder / "id_ed25519.pub").read_text().split()
    (folder / "known_hosts").write_text(f"{uuid} {public[0]} {public[1]}\n")
    assert "is not the one it had" in lume.run("ssh", name, "id", status=255).stderr
    (folder / "known_hosts").write_text(known)


def read_files(vm_disk: Path, scratch: Path, name: str) -> bytes:
    """All files of a folder of the guest's root file system, put together."""
    raw, out = scratch / "raw", scratch / "out"
    out.mkdir()
    subprocess.run(["qemu-img", "convert", "-O", "raw", vm_disk, raw], check=True)
    # The second partition lies behind the first 129 MiB, see images/build.py.
    where = f"{raw}?offset={129 << 20}"
    argv = ["/sbin/debugfs", "-R", f"rdump {name} {out}", where]
    subprocess.run(argv, check=True, capture_output=True)
    return b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())


def build(server: Server) -> None:
    """Build the image debian:12 through the API."""
    recipe = {"packages": ["tree"], "run": ["echo built > /etc/built", "id -un >> /etc/built"]}
    begun = server.call("POST", "/images/build", 202, json={"image": "debian:12", **recipe})
    operation = server.wait_operation(begun["id"], BUILD_S)
    assert operation["status"] == "succeeded", operation


def test_a_built_debian_boots_grows_sees_shares_shuts_down_in_order_and_is_cloned(
    server: Server, tmp_path: Path, alone: Callable[[], AbstractContextManager[None]]
) -> None:
    build(server)
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "from-host").write_text("hello guest\n")
    share = {"hostPath": str(shared), "readOnly": False}
    server.create("deb", image="debian:12", diskSize="7GB", memory="1GB", cpu=1)
    server.run("deb", sharedDirectories=[share])
    # An address is told once sshd has said its name.
    address = server.wait_for("deb", lambda vm: "ipAddress" in vm, BOOT_S)["ipAddress"]

    with logged_in(server, address) as sh:
        assert sh("id -un; hostname; sudo id -un") == "lume\ndeb\nroot"
        # What came with the recipe.
        assert sh("cat /etc/built; command -v tree") == "built\nroot\n/usr/bin/tree"
        # The root file system has the whole of a disk that is larger than the image.
        assert sh("sudo cloud-init status --wait").endswith("status: done")
        assert int(sh("df --output=size -B1 / | tail -1")) > 6 * 1024**3
        # A share is there, both ways.
        assert sh("cat /mnt/shared/shared/from-host") == "hello guest"
        sh("echo hello host | sudo tee /mnt/shared/shared/from-guest")
        assert (shared / "from-guest").read_text() == "hello host\n"
        assert sh("systemctl --failed --no-legend --plain") == ""
        # What belongs to one machine was made by this one.
        identity = sh(IDENTITY)
        assert len(identity.split()[0]) == 32
        # A kernel update would reach the partition that the boot loaders read.
        sh("sudo /usr/local/sbin/update-boot-partition")
        show = "cd /boot/efi; cat syslinux.cfg loader/entries/*; cd /"
        listed = sh(f"sudo sh -ec 'mount /boot/efi; {show}; umount /boot/efi'")
        version = sh("uname -r")
        assert listed.count(f"/vmlinuz-{version}-") == 2
        assert listed.count(f"/initramfs-{version}-") == 2
    check_ssh(server, "deb", tmp_path)

    with alone():
        stopped = server.call("POST", "/vms/deb/stop", 200)
    assert stopped["lastEnd"]["step"] == "power-button"
    journal = read_files(server.vm_dir("deb") / "disk.qcow2", tmp_path, "/var/log/journal")
    assert b"Power key pressed" in journal
    assert b"Reached target poweroff.target" in journal or b"System Power Off" in journal

    # A clone is another machine, with the same files.
    server.call("POST", "/vms/clone", 200, json={"name": "deb", "newName": "twin"})
    server.run("twin")
    server.wait_for("twin", lambda vm: "ipAddress" in vm, BOOT_S)
    twin = Lume(server.home)("ssh", "twin", f"cat /etc/built; hostname; {IDENTITY}")
    assert twin.startswith("built\nroot\ntwin\n")
    twin = twin.removeprefix("built\nroot\ntwin\n")
    assert len(twin.split()) == len(identity.split())
    assert not set(twin.split()) & set(identity.split()) - {"ssh-ed25519"}
    server.call("POST", "/vms/twin/stop?force=true", 200)
