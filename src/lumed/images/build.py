"""Debian guests made from the Debian mirror, without root: what `lume image build` runs.

mmdebstrap makes namespaces in which debian_guest/build.sh is root over nothing but its own files;
it puts the packages together in memory and writes the root file system through the descriptor
of the disk image. Nothing of it can be left behind: the memory and every process belong to the
namespaces, and these end when the pipe from this process closes, also if it is killed.

The disk: GPT; a FAT partition with SYSLINUX and systemd-boot (see bootdisk), kept up to date in
the guest by a hook of its kernel packages; ext4, which cloud-init grows at the first boot.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import os
import pwd
import re
import signal
import subprocess
import tarfile
import tempfile
import threading
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from lumed.errors import (
    InvalidField,
    MissingDependency,
    NotPossibleHere,
    TimedOut,
    ToolFailed,
)
from lumed.images import bootdisk, debs
from lumed.images.gpt import (
    BIOS_BOOTABLE,
    EFI_SYSTEM,
    END_SECTORS,
    LINUX_ROOT_AMD64,
    Partition,
    plan_gpt,
)
from lumed.images.local import BuiltImage, Builtin
from lumed.osproc import get_program, run_tool_blocking
from lumed.threads import in_loop, run_to_end

# Name of the image to name of the release.
RELEASES = {"debian:12": "bookworm", "debian:13": "trixie"}

# systemd-resolved: systemd-networkd leaves the name servers of DHCP to it. fdisk: growpart. The
# cloud kernel is half the size of the general one, and has virtiofs, but no 9p and no DRM. No
# time service: the machine's clock follows the host's, and each service that systemd locks in
# costs a boot some 4 % in software emulation.
_PACKAGES = (
    *("linux-image-cloud-amd64", "initramfs-tools", "lz4", "systemd-sysv", "udev", "dbus"),
    *("libpam-systemd", "systemd-resolved", "cloud-init", "fdisk"),
    *("cloud-guest-utils", "openssh-server", "sudo", "qemu-guest-agent", "ca-certificates"),
    *("curl", "iproute2", "iputils-ping", "less", "netbase", "procps", "vim-tiny"),
)
# As for tiny: see KERNEL_ARGUMENTS there. earlyprintk would be of use only before the serial port.
_KERNEL_ARGUMENTS = "console=tty0 console=ttyS0 quiet no_timer_check cryptomgr.notests=1"

_MIB = 1 << 20
_BOOT_BYTES = 128 * _MIB  # two kernels with their initramfs, while one replaces the other
_DISK_BYTES = 4 << 30
_DEADLINE_S = 1800.0
_TEXT_LIMIT = 100_000  # of an environment variable: 128 KiB (execve(2), MAX_ARG_STRLEN)
_LAST_LINES = 15

_PACKAGE_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+(?::[a-z0-9]+)?")
_GUEST = Path(__file__).parent / "debian_guest"
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_LOCAL_MIRROR = re.compile(r"https?://(localhost|127\.|\[::1\])")

# The first word of mmdebstrap's lines to what a user reads.
_STEPS = (
    ("I: running apt-get update", "Fetching package lists"),
    ("I: downloading packages", "Fetching packages"),
    ("I: extracting archives", "Unpacking packages"),
    ("I: installing essential", "Installing the base system"),
    ("I: installing remaining", "Installing packages"),
    ("I: running commands", "Running commands"),
    ("I: writing the disk", "Writing the disk"),
)


@dataclass(frozen=True, slots=True)
class Mirrors:
    """Where Debian's packages come from, as apt writes it."""

    main: str = "http://deb.debian.org/debian"
    security: str = "http://deb.debian.org/debian-security"


@dataclass(frozen=True, slots=True)
class Recipe:
    """A guest to be built: the release's name, packages beside ours, lines for a shell in it."""

    suite: str
    packages: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()


def plan_recipe(image: str, packages: Sequence[str] = (), run: Sequence[str] = ()) -> Recipe:
    """The recipe for an image of RELEASES. Each of `run` is a command line, run by root in order.

    Raises InvalidField for a name that is no such image, no package name, or too much text.
    """
    suite = RELEASES.get(image)
    if suite is None:
        reason = f"must be one of {', '.join(RELEASES)}, not {image!r:.80}"
        raise InvalidField(f"image {reason}", fields={"image": reason})
    for name in packages:
        if not _PACKAGE_NAME.fullmatch(name):
            raise _invalid("packages", f"holds {name!r:.80}, which is no package name")
    if len(",".join(packages)) > _TEXT_LIMIT:
        raise _invalid("packages", f"is too long; {_TEXT_LIMIT} bytes are taken")
    if any("\0" in line for line in run):
        raise _invalid("run", "holds a NUL character")
    if sum(len(line.encode(errors="replace")) + 1 for line in run) > _TEXT_LIMIT:
        raise _invalid(
            "run", f"is too long; {_TEXT_LIMIT} bytes are taken", hint="fetch a script in it"
        )
    return Recipe(suite, tuple(dict.fromkeys(packages)), tuple(run))


def debian_guest(recipe: Recipe) -> Builtin:
    """The recipe as the image cache wants it: built once, then found.

    Its version changes with the recipe and with the builder, not with the mirror: a newer
    package alone does not outdate an image.
    """

    async def build(directory: Path, say: Callable[[str], None]) -> BuiltImage:
        return await build_debian(recipe, directory, in_loop(say))

    identity = repr((_builder_version(), recipe)).encode()
    return Builtin(hashlib.sha256(identity).hexdigest()[:12], build)


async def build_debian(
    recipe: Recipe, directory: Path, report: Callable[[str], None]
) -> BuiltImage:
    """Build the image in an empty directory; takes a minute or two. A cancellation ends it.

    `report` is told each step, in a thread. Raises NotPossibleHere where no namespaces can be
    made or on another architecture, MissingDependency, ToolFailed with the last words of
    mmdebstrap (a package that does not exist, no mirror, a command that failed), TimedOut.
    """
    with contextlib.closing(_Lifeline()) as lifeline:
        return await run_to_end(
            partial(_build, recipe, directory, report, lifeline), on_cancel=lifeline.close
        )


class _Lifeline:
    """A pipe whose other end the builder watches: closed, here or by our death, it ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.read_fd, self._write_fd = os.pipe()
        self.cut = False

    def close(self) -> None:
        """End the builder, if it still runs."""
        with self._lock:
            if not self.cut:
                self.cut = True
                os.close(self._write_fd)


def _build(
    recipe: Recipe, directory: Path, report: Callable[[str], None], lifeline: _Lifeline
) -> BuiltImage:
    try:
        _check_host()
        with tempfile.TemporaryDirectory(dir=directory, prefix="unpacked-") as scratch:
            tools, fetched = Path(scratch, "root"), Path(scratch, "packages")
            tools.mkdir()
            fetched.mkdir()
            report("Fetching packages")
            debs.unpack_packages(debs.fetch_packages(bootdisk.PACKAGES, fetched), tools)
            disk = directory / "disk"
            layout = _Layout()
            _write_table(disk, layout, tools)
            boot = _write_root(recipe, disk, layout, report, lifeline)
            with tarfile.open(fileobj=io.BytesIO(boot)) as archive:
                for name in ("vmlinuz", "initrd.img"):
                    content = archive.extractfile(name)
                    if content is None:
                        raise ToolFailed(f"The built guest has no {name}")
                    Path(scratch, name).write_bytes(content.read())
            bootdisk.write_boot_partition(
                disk,
                sectors=_BOOT_BYTES // bootdisk.SECTOR,
                label="BOOT",
                kernel=Path(scratch, "vmlinuz"),
                initramfs=Path(scratch, "initrd.img"),
                arguments=f"root=PARTUUID={layout.root.id} ro {_KERNEL_ARGUMENTS}",
                tools=tools,
            )
        return BuiltImage(disk)
    finally:
        os.close(lifeline.read_fd)


class _Layout:
    """Where the partitions of one disk lie, with ids of its own."""

    def __init__(self) -> None:
        first = bootdisk.FIRST_SECTOR
        root = first + _BOOT_BYTES // bootdisk.SECTOR
        self.sectors = _DISK_BYTES // bootdisk.SECTOR
        end = (self.sectors - END_SECTORS) // 2048 * 2048
        self.boot = Partition(
            EFI_SYSTEM, uuid.uuid4(), first, root - 1, "boot", attributes=BIOS_BOOTABLE
        )
        self.root = Partition(LINUX_ROOT_AMD64, uuid.uuid4(), root, end - 1, "root")

    @property
    def fstab(self) -> str:
        # Not mounted until a kernel is updated: that costs a boot nothing.
        return (
            f"PARTUUID={self.root.id} / ext4 errors=remount-ro 0 1\n"
            f"PARTUUID={self.boot.id} /boot/efi vfat umask=0077,noauto 0 0\n"
        )


def _write_table(disk: Path, layout: _Layout, tools: Path) -> None:
    code = (tools / "usr/lib/syslinux/mbr/gptmbr.bin").read_bytes()
    front, end = plan_gpt(
        layout.sectors, [layout.boot, layout.root], disk_id=uuid.uuid4(), boot_code=code
    )
    with disk.open("xb") as image:
        image.truncate(_DISK_BYTES)
        image.write(front)
        image.seek(-len(end), os.SEEK_END)
        image.write(end)


def _write_root(
    recipe: Recipe,
    disk: Path,
    layout: _Layout,
    report: Callable[[str], None],
    lifeline: _Lifeline,
) -> bytes:
    """Let build.sh fill the root partition; returns the tar of kernel and initramfs."""
    mirrors = find_mirrors()
    root_sectors = layout.root.last - layout.root.first + 1
    with disk.open("r+b") as image, tempfile.TemporaryFile(dir=disk.parent) as boot:
        # The script is another user for the kernel. The directory is ours alone all the same.
        disk.chmod(0o666)
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "TMPDIR": "/tmp",  # noqa: S108  (the script mounts a file system of its own there)
            "SUITE": recipe.suite,
            "SOURCES": plan_sources(recipe.suite, mirrors),
            "GUEST_SOURCES": plan_sources(recipe.suite, mirrors, in_guest=True),
            "PACKAGES": ",".join((*_PACKAGES, *recipe.packages)),
            "FILES": _pack_files(),
            "FSTAB": layout.fstab,
            "COMMANDS": "".join(f"{line}\n" for line in recipe.commands),
            "DISK_FD": str(image.fileno()),
            "OFFSET": str(layout.root.first * bootdisk.SECTOR),
            "SIZE": str(root_sectors * bootdisk.SECTOR // 1024),
            "ROOT_UUID": str(uuid.uuid4()),
        }
        # How this host reaches the outside.
        for name in ("http_proxy", "https_proxy", "no_proxy"):
            if name in os.environ:
                environment[name] = os.environ[name]
        _run_script(environment, image.fileno(), boot.fileno(), report, lifeline)
        boot.seek(0)
        return boot.read()


def _run_script(
    environment: dict[str, str],
    disk_fd: int,
    boot_fd: int,
    report: Callable[[str], None],
    lifeline: _Lifeline,
) -> None:
    script = (_GUEST / "build.sh").read_text()
    argv = [str(_mmdebstrap()), "--unshare-helper", "/bin/sh", "-c", script]
    process = subprocess.Popen(
        argv,
        stdin=lifeline.read_fd,
        stdout=boot_fd,
        stderr=subprocess.PIPE,
        env=environment,
        cwd="/",
        pass_fds=(disk_fd,),
        start_new_session=True,
        text=True,
        errors="replace",
    )
    late = threading.Event()

    def give_up() -> None:
        late.set()
        lifeline.close()

    timer = threading.Timer(_DEADLINE_S, give_up)
    timer.start()
    last: deque[str] = deque(maxlen=_LAST_LINES)
    assert process.stderr is not None  # noqa: S101  (it is a pipe)
    try:
        for line in process.stderr:
            if line.strip():
                last.append(line.strip())
            for start, step in _STEPS:
                if line.startswith(start):
                    report(step)
    finally:
        timer.cancel()
        # Nothing reads its words any more, or they have ended; the group has, too, or must.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()
    if late.is_set():
        raise TimedOut(f"The build did not end within {_DEADLINE_S:g} s: {' '.join(last)[-300:]}")
    if process.returncode != 0:
        raise ToolFailed(f"The build failed: {_why(last)}", fields={"output": list(last)})


def _why(last: Sequence[str]) -> str:
    """The lines that say what went wrong; mmdebstrap's own end says only that it failed."""
    errors = [line for line in last if line.startswith(("E: ", "Err:", "dpkg: error"))]
    told = [line for line in errors if "mmdebstrap" not in line and "unshare" not in line]
    return " ".join(told or errors or last)[:1000] or "no message"


def find_mirrors() -> Mirrors:
    """The mirrors that this host's apt uses for Debian; the official ones where it uses none.

    See apt-get(8), "indextargets". Blocking.
    """
    ask = ["apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)", "Origin: Debian"]
    try:
        lines = run_tool_blocking(ask, timeout_s=60).decode().splitlines()
    except (ToolFailed, MissingDependency):
        lines = []
    found: dict[str, str] = {}
    for label, _, uri in (line.partition(" ") for line in lines):
        if uri.startswith(("http://", "https://")):
            found.setdefault(label, uri.rstrip("/"))
    usual = Mirrors()
    return Mirrors(found.get("Debian", usual.main), found.get("Debian-Security", usual.security))


def plan_sources(suite: str, mirrors: Mirrors, *, in_guest: bool = False) -> str:
    """The lines of a sources.list. A mirror on the host's loopback is of no use in the guest."""
    usual = Mirrors()
    main, security = mirrors.main, mirrors.security
    # The guest has Debian's keys where apt looks for them; the host may be of another kind.
    option = "" if in_guest else f"[signed-by={_KEYRING}] "
    if in_guest and _LOCAL_MIRROR.match(main):
        main = usual.main
    if in_guest and _LOCAL_MIRROR.match(security):
        security = usual.security
    return (
        f"deb {option}{main} {suite} main\n"
        f"deb {option}{main} {suite}-updates main\n"
        f"deb {option}{security} {suite}-security main\n"
    )


def _check_host() -> None:
    """Raise what says why this host cannot build, before anything is fetched."""
    machine = os.uname().machine
    if machine != "x86_64":
        raise NotPossibleHere(
            f"Debian guests are built for x86_64 only, and this host is {machine}"
        )
    program = _mmdebstrap()
    if not _KEYRING.exists():
        raise MissingDependency(
            "The keys of the Debian archive are not installed",
            hint="sudo apt-get install debian-archive-keyring",
        )
    if os.geteuid() != 0:
        get_program("newuidmap", package="uidmap")
    try:
        run_tool_blocking([program, "--unshare-helper", "/bin/true"], timeout_s=30)
    except ToolFailed as error:
        words = error.message
        hint = "build on a host, or in a container, that may make user and mount namespaces"
        if "sub" in words and "id" in words and os.geteuid() != 0:
            name = pwd.getpwuid(os.geteuid()).pw_name
            span = "100000-165535"
            hint = f"sudo usermod --add-subuids {span} --add-subgids {span} {name}"
        elif os.geteuid() != 0:
            hint = "sudo sysctl -w kernel.unprivileged_userns_clone=1"
        raise NotPossibleHere(
            f"This host makes no namespaces to build in: {words}", hint=hint
        ) from error


def _mmdebstrap() -> Path:
    return get_program("mmdebstrap", package="mmdebstrap")


def _pack_files() -> str:
    """The files that differ from Debian's, as a tar in base64."""
    packed = io.BytesIO()
    root = _GUEST / "root"
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path in _guest_files():
            content = path.read_bytes()
            info = tarfile.TarInfo(path.relative_to(root).as_posix())
            info.size = len(content)
            # A package of Python files keeps no modes.
            info.mode = 0o755 if content.startswith(b"#!") else 0o644
            archive.addfile(info, io.BytesIO(content))
    return base64.b64encode(packed.getvalue()).decode()


def _guest_files() -> list[Path]:
    return sorted(path for path in (_GUEST / "root").rglob("*") if path.is_file())


@cache
def _builder_version() -> str:
    names = ("build.py", "bootdisk.py", "gpt.py", "debian_guest/build.sh")
    total = hashlib.sha256()
    for source in [*(Path(__file__).parent / name for name in names), *_guest_files()]:
        total.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return total.hexdigest()


def _invalid(field: str, reason: str, *, hint: str | None = None) -> InvalidField:
    return InvalidField(f"{field} {reason}", hint=hint, fields={field: reason})
