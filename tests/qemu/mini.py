"""The smallest guest that can mount things: a Debian kernel, busybox, and one shell script.

Debian's cloud kernel has virtiofs but no 9p, so this takes the full kernel, of which only the
few modules named here are unpacked.
"""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# In the order in which they must be loaded.
_MODULES = (
    *("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci"),
    *("fuse", "virtiofs", "netfs", "fscache", "9pnet", "9pnet_virtio", "9p"),
    *("virtio_console", "cdrom", "isofs", "virtio_blk"),
)

_PRELUDE = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox mount -t proc none /proc
/bin/busybox mount -t sysfs none /sys
/bin/busybox mount -t devtmpfs none /dev
/bin/busybox --install -s /bin
for module in MODULES; do insmod /modules/$module.ko || echo "no module $module"; done
"""
_EPILOGUE = """
echo guest-done
poweroff -f
"""


@dataclass(frozen=True, slots=True)
class MiniKernel:
    """A kernel and the folder of its modules (NAME.ko)."""

    kernel: Path
    modules: Path


def unpack_kernel(folder: Path) -> MiniKernel:
    """Download Debian's kernel package with apt and unpack what the guest needs (about 6 s)."""
    depends = _run(["apt-cache", "show", "--no-all-versions", "linux-image-amd64"], folder)
    line = next(row for row in depends.splitlines() if row.startswith("Depends: "))
    package = line.removeprefix("Depends: ").split()[0]
    _run(["apt-get", "download", "-q", package], folder)
    deb = next(folder.glob("*.deb"))
    names = [f"*/{name}.ko" for name in _MODULES]
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE, cwd=folder
    ) as source:
        subprocess.run(
            ["tar", "-x", "--wildcards", "./boot/vmlinuz-*", *names],
            stdin=source.stdout,
            cwd=folder,
            check=True,
            timeout=100,
        )
    deb.unlink()
    modules = folder / "modules"
    modules.mkdir()
    for found in folder.glob("lib/**/*.ko"):
        found.rename(modules / found.name)
    return MiniKernel(next(folder.glob("boot/vmlinuz-*")), modules)


def build_initramfs(kernel: MiniKernel, script: str) -> bytes:
    """An initramfs that runs `script` (busybox sh, as root), prints guest-done and powers off."""
    out = io.BytesIO()
    _add(out, "bin", 0o040755, b"")
    _add(out, "modules", 0o040755, b"")
    _add(out, "bin/busybox", 0o100755, Path("/bin/busybox").read_bytes())
    for name in _MODULES:
        _add(out, f"modules/{name}.ko", 0o100644, (kernel.modules / f"{name}.ko").read_bytes())
    prelude = _PRELUDE.replace("MODULES", " ".join(_MODULES))
    _add(out, "init", 0o100755, (prelude + script + _EPILOGUE).encode())
    _add(out, "TRAILER!!!", 0, b"")
    return out.getvalue()


def run_guest(
    kernel: MiniKernel,
    script: str,
    folder: Path,
    *,
    argv: Sequence[str] = (),
    pass_fds: Sequence[int] = (),
    timeout_s: float = 60,
    memory_bytes: int = 256 << 20,
) -> str:
    """Boot, run the script, and return what the guest wrote to its serial console."""
    initramfs = folder / "initramfs"
    initramfs.write_bytes(build_initramfs(kernel, script))
    done = subprocess.run(
        guest_argv(kernel, initramfs, memory_bytes=memory_bytes, argv=argv),
        pass_fds=tuple(pass_fds),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout_s,
        check=False,
    )
    return done.stdout.decode(errors="replace")


def guest_argv(
    kernel: MiniKernel, initramfs: Path, *, memory_bytes: int = 256 << 20, argv: Sequence[str] = ()
) -> list[str]:
    """A QEMU command line like the one that lumed makes: sandboxed, shared memory, no defaults."""
    return [
        *("qemu-system-x86_64", "-accel", "tcg", "-nodefaults", "-no-user-config"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-machine", "q35,memory-backend=ram", "-m", str(memory_bytes >> 20)),
        *("-object", f"memory-backend-memfd,id=ram,size={memory_bytes},share=on"),
        *("-display", "none", "-serial", "stdio", "-no-reboot"),
        *("-kernel", os.fspath(kernel.kernel), "-initrd", os.fspath(initramfs)),
        *("-append", "console=ttyS0 quiet panic=-1"),
        *argv,
    ]


def _run(argv: Sequence[str], cwd: Path) -> str:
    done = subprocess.run(argv, cwd=cwd, check=True, capture_output=True, timeout=100)
    return done.stdout.decode()


def _add(out: io.BytesIO, name: str, mode: int, content: bytes) -> None:
    # The "newc" form that the kernel reads (Documentation/driver-api/early-userspace/
    # buffer-format.rst): thirteen fields of 8 hex digits, name and content padded to 4 bytes.
    encoded = name.encode() + b"\0"
    fields = (out.tell(), mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
    out.write(b"070701" + b"".join(b"%08X" % value for value in fields) + encoded)
    out.write(b"\0" * (-out.tell() % 4) + content)
    out.write(b"\0" * (-out.tell() % 4))
