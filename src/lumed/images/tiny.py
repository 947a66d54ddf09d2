"""The built-in guest `tiny`: Debian's kernel and BusyBox, ready in three seconds of emulation.

It is put together from the host's own package archive in a few seconds, without root: nothing
is downloaded from anywhere else, and what runs in it is the script in `tiny_guest/`. The same
user space, booted with RESCUE_ARGUMENTS, is the rescue system of any VM.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from lumed.errors import MissingDependency, NotPossibleHere, ToolFailed
from lumed.images import bootdisk, debs
from lumed.images.initramfs import Archive, read_modules
from lumed.images.local import BuiltImage, Builtin
from lumed.model.vm import DiskFormat
from lumed.osproc import run_tool_blocking
from lumed.threads import in_loop, run_to_end

# Serial last: it is then the guest's /dev/console. earlyprintk brings the first byte of a
# `-kernel` boot from 3.3 s to 0.6 s. no_timer_check: on a busy host an emulated timer may miss
# the few ticks in which Linux tests it, and Linux panics ("IO-APIC + timer doesn't work!", seen
# at a load of 6 on 2 cores); under KVM it leaves this test out by itself. The rest leaves out
# self-tests of the kernel's ciphers and trace events, 0.4 s of 3.5 s.
KERNEL_ARGUMENTS = (
    "console=tty0 console=ttyS0 earlyprintk=ttyS0 quiet no_timer_check cryptomgr.notests=1"
    " initcall_blacklist=crypto_kdf108_init,init_kprobe_trace"
)
RESCUE_ARGUMENTS = f"{KERNEL_ARGUMENTS} lumed.rescue=1"

# Room for kernel and user space, the rest free for the guest under /disk.
_DISK_BYTES = 128 << 20

_GUEST = Path(__file__).parent / "tiny_guest"
_GUEST_PACKAGES = ("busybox-static", "qemu-guest-agent")
_LOADER = Path("/lib64/ld-linux-x86-64.so.2")

# Drivers by what tiny_guest/lib/lumed/functions loads; a kernel without one leaves it out
# (Debian's cloud kernel has no 9p, AHCI and DRM).
_MODULES = (
    *("virtio_pci", "virtio_net", "virtio_blk", "virtio_scsi", "virtio_console", "virtio_rng"),
    *("virtio_balloon", "virtio_input", "virtio_gpu", "ahci", "sd_mod", "sr_mod"),
    *("virtiofs", "9pnet_virtio", "9p", "isofs", "vfat", "button", "evdev"),
    *("nls_cp437", "nls_ascii", "nls_iso8859_1", "nls_utf8"),
)


@dataclass(frozen=True, slots=True)
class TinyImage:
    """A built image. version, which the guest prints, names the kernel, builder and packages."""

    disk: Path
    disk_format: DiskFormat
    kernel: Path
    initramfs: Path
    version: str


def builtin_tiny() -> Builtin:
    """`tiny` as the image cache wants it, which builds it once and lets it appear as a whole.

    Its version changes with the builder and the guest's script. A newer kernel package alone
    does not outdate a built image: the cache must find it without asking apt.
    """

    async def build(directory: Path, say: Callable[[str], None]) -> BuiltImage:
        image = await run_to_end(partial(build_tiny, directory, in_loop(say)))
        return BuiltImage(image.disk, image.kernel, image.initramfs)

    return Builtin(_builder_version(), build)


def build_tiny(directory: Path, report: Callable[[str], None] = lambda _: None) -> TinyImage:
    """Build the image's files in `directory`; blocks for 5 s. The same packages, the same bytes.

    `report` is told each step. Raises MissingDependency or ToolFailed, with a hint, if the
    packages cannot be had, and NotPossibleHere on another architecture; what was written until
    then is left to the caller.
    """
    architecture = os.uname().machine
    if architecture != "x86_64":
        raise NotPossibleHere(
            f"The built-in image is made for x86_64 only, and this host is {architecture}"
        )
    with tempfile.TemporaryDirectory(dir=directory, prefix="unpacked-") as scratch:
        root, fetched = Path(scratch, "root"), Path(scratch, "packages")
        root.mkdir()
        fetched.mkdir()
        report("Fetching packages")
        names = [*debs.find_kernel_packages("amd64"), *_GUEST_PACKAGES, *bootdisk.PACKAGES]
        packages = debs.fetch_packages(names, fetched)
        report("Unpacking packages")
        debs.unpack_packages(packages, root)

        report("Writing the disk")
        kernel = _get_kernel(root)
        release = kernel.name.removeprefix("vmlinuz-")
        used = hashlib.sha256("\n".join(package.name for package in packages).encode())
        image = TinyImage(
            disk=directory / "disk.raw",
            disk_format=DiskFormat.RAW,
            kernel=directory / "vmlinuz",
            initramfs=directory / "initramfs",
            version=f"{release}.{_builder_version()}.{used.hexdigest()[:8]}",
        )
        image.kernel.write_bytes(kernel.read_bytes())
        # Not compressed: measured as fast as lz4, 0.15 s faster than gzip, and needs no tool.
        image.initramfs.write_bytes(_make_root(root, image.version).data())
        bootdisk.write_boot_disk(
            image.disk,
            size_bytes=_DISK_BYTES,
            kernel=image.kernel,
            initramfs=image.initramfs,
            arguments=KERNEL_ARGUMENTS,
            tools=root,
        )
    return image


@cache
def _builder_version() -> str:
    """Eight hex digits of the builder's and the guest's files."""
    names = ("tiny.py", "debs.py", "initramfs.py", "bootdisk.py")
    total = hashlib.sha256()
    for source in [*map(Path(__file__).with_name, names), *_guest_files()]:
        total.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return total.hexdigest()[:8]


def _guest_files() -> list[Path]:
    return sorted(path for path in _GUEST.rglob("*") if path.is_file())


def _get_kernel(root: Path) -> Path:
    kernels = sorted(root.glob("boot/vmlinuz-*"))
    if len(kernels) != 1:
        raise ToolFailed(f"Expected one kernel in the kernel package, found {len(kernels)}")
    return kernels[0]


def _make_root(unpacked: Path, version: str) -> Archive:
    """The guest's root directory, of unpacked packages and the host's shared libraries."""
    root = Archive()
    for name in ("dev", "disk", "mnt", "proc", "root", "run", "sys", "tmp"):
        root.add_directory(name)
    # The kernel opens it for /init before anything is mounted.
    root.add_character_device("dev/console", 5, 1)
    for path in _guest_files():
        name = path.relative_to(_GUEST).as_posix()
        is_program = name.startswith(("sbin/", "etc/acpi/"))
        root.add_file(name, path.read_bytes(), 0o755 if is_program else 0o644)
    root.add_file("etc/lumed-version", version.encode() + b"\n")
    root.add_link("var/run", "/run")
    _add_busybox(root, unpacked)
    _add_agent(root, unpacked)
    modules = read_modules(unpacked, _MODULES)
    for wanted, needed in modules.items():
        order = "".join(f"{module.name}\n" for module in needed)
        root.add_file(f"lib/modules/{wanted}.order", order.encode())
        for module in needed:
            root.add_file(f"lib/modules/{module.name}.ko", module.content)
    return root


def _add_busybox(root: Archive, unpacked: Path) -> None:
    busybox = next(
        path for name in ("bin", "usr/bin") for path in (unpacked / name).glob("busybox")
    )
    root.add_file("bin/busybox", busybox.read_bytes(), 0o755)
    root.add_link("init", "bin/busybox")
    for name in run_tool_blocking([busybox, "--list-full"], timeout_s=10).decode().split():
        # A program of ours stands for the one of that name, wherever its path puts it.
        if name not in root and f"sbin/{Path(name).name}" not in root:
            root.add_link(name, "/bin/busybox")


def _add_agent(root: Archive, unpacked: Path) -> None:
    # The libraries are the host's: QEMU itself needs each of them, in the same release.
    agent = unpacked / "usr/sbin/qemu-ga"
    root.add_file("usr/sbin/qemu-ga", agent.read_bytes(), 0o755)
    try:
        listing = run_tool_blocking([_LOADER, "--list", agent], timeout_s=10).decode()
    except ToolFailed as error:
        raise MissingDependency(
            f"A library of the QEMU guest agent is missing: {error.message}",
            hint="sudo apt-get install qemu-guest-agent",
        ) from error
    for path in re.findall(r"(?:=> |^\t)(/\S+) \(0x", listing, re.MULTILINE):
        root.add_file(path.removeprefix("/"), Path(path).read_bytes(), 0o755)
