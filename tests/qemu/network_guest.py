"""A guest for the network tests: a kernel, busybox, one network card, a shell on the serial line.

All that the tests ask of a guest is `Guest.run`.
"""

import contextlib
import os
import re
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lumed.model.run import NetDevice
from lumed.osproc import get_program

MODULES = (
    *("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci"),
    *("failover", "net_failover", "virtio_net"),
)
INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in {modules}; do insmod /lib/$module.ko; done
stty -F /dev/ttyS0 -echo
echo guest-ready >/dev/ttyS0
# No interactive shell: that one takes the end of a background job for the end of its input.
while read -r line; do
    eval "$line" </dev/null
    echo end-of-output
done
"""
DHCP_EVENT = """#!/bin/sh
[ "$1" = bound ] || exit 0
ip address add "$ip/$mask" dev "$interface"
ip route add default via "$router"
for server in $dns; do echo "nameserver $server"; done >/etc/resolv.conf
"""
BOOT_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Kernel:
    image: Path
    initramfs: Path


def make_kernel(directory: Path) -> Kernel:
    """Unpack Debian's cloud kernel and pack busybox with its virtio modules."""
    with contextlib.chdir(directory):
        told = check_output("apt-cache", "depends", "linux-image-cloud-amd64")
        found = re.search(r"Depends: (linux-image-\S+)", told)
        assert found is not None, told
        check_output("apt-get", "download", "-q", found[1])
        check_output("dpkg-deb", "-x", str(next(directory.glob("*.deb"))), "kernel")
    root = directory / "root"
    for name in ("bin", "lib", "proc", "sys", "dev", "etc"):
        (root / name).mkdir(parents=True)
    shutil.copy(get_program("busybox", package="busybox-static"), root / "bin")
    for name in MODULES:
        shutil.copy(next(directory.glob(f"kernel/lib/modules/**/{name}.ko")), root / "lib")
    write_program(root / "init", INIT.format(modules=" ".join(MODULES)))
    write_program(root / "etc" / "dhcp-event", DHCP_EVENT)
    names = "\n".join(str(path.relative_to(root)) for path in root.rglob("*"))
    archive = subprocess.run(
        ["busybox", "cpio", "-o", "-H", "newc"],
        input=names.encode(),
        cwd=root,
        check=True,
        capture_output=True,
        timeout=20,
    )
    initramfs = directory / "initramfs"
    initramfs.write_bytes(archive.stdout)
    return Kernel(next(directory.glob("kernel/boot/vmlinuz-*")), initramfs)


def check_output(*argv: str) -> str:
    done = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=120)
    return done.stdout


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@dataclass
class Guest:
    """A running guest; run() gives what one line of shell in it printed."""

    process: subprocess.Popen[bytes]
    serial: socket.socket

    def run(self, command: str, timeout_s: float = 20.0) -> str:
        self.serial.sendall(f"{command}\n".encode())
        return self.read_until("end-of-output", timeout_s).strip()

    def read_until(self, mark: str, timeout_s: float) -> str:
        deadline = time.monotonic() + timeout_s
        seen = b""
        while mark.encode() not in seen:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self.serial], [], [], max(left, 0))
            assert ready, f"no {mark!r} within {timeout_s:g} s, but {seen[-2000:]!r}"
            chunk = self.serial.recv(4096)
            assert chunk, f"QEMU ended: {seen[-2000:]!r}"
            seen += chunk
        return seen.decode().split(mark)[0].replace("\r", "")

    def use_dhcp(self) -> None:
        told = self.run("ip link set eth0 up; udhcpc -q -n -i eth0 -s /etc/dhcp-event")
        assert "lease of" in told, told


@contextlib.contextmanager
def boot(kernel: Kernel, net: NetDevice, mac: str) -> Iterator[Guest]:
    """Boot a guest with the given network card; it is killed at the end of the block."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        argv: list[str | Path] = [
            *(get_program("qemu-system-x86_64", package="qemu-system-x86"), "-nodefaults"),
            *("-no-user-config", "-display", "none", "-machine", "q35", "-accel", "tcg"),
            *("-m", "192M", "-kernel", kernel.image, "-initrd", kernel.initramfs),
            *("-append", "console=ttyS0 quiet loglevel=1 panic=-1", "-no-reboot"),
            *("-chardev", f"socket,id=line,fd={theirs.fileno()}", "-serial", "chardev:line"),
            *("-netdev", f"{net.netdev},id=n0"),
            *("-device", f"virtio-net-pci,netdev=n0,mac={mac},romfile="),
        ]
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(), *net.pass_fds)
        )
        theirs.close()
        try:
            guest = Guest(process, ours)
            guest.read_until("guest-ready", BOOT_TIMEOUT_S)
            yield guest
        finally:
            process.kill()
            process.wait()


def require_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
