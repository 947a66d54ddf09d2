"""Look at a local disk image without trusting it.

The format is found by our own look at the magic and then always named: QEMU never probes, since
a guest that writes a qcow2 header into its raw disk could make it open any file of the host.
So `x.raw` with a qcow2 header is refused; `x.img` is what distributions call both kinds, and a
qcow2 under that name is taken as qcow2 if it is self-contained.

After the header, `qemu-img check` walks the tables of a qcow2 file under limits on CPU time and
memory (some 6 ms; it finds a download that was cut off, which no header shows), and `qemu-img
convert` reads the first sectors (7 ms). `qemu-img info` would add nothing to that.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lumed.errors import InvalidField, ToolFailed
from lumed.images import qcow2
from lumed.images.boot import FIRST_BYTES, plan_firmware
from lumed.images.qcow2 import UnfitImage
from lumed.model.vm import DiskFormat, Firmware
from lumed.osproc import Limits, get_program, run_tool_blocking
from lumed.threads import run_to_end

_LIMITS = Limits(cpu_s=60, memory_bytes=1 << 30)
_TIMEOUT_S = 120
_LEAKS_ONLY = 3  # qemu-img(1), "check": harmless in an image that nobody writes to
_RAW_NAMES = {".raw", ".dd"}

# Offset (negative: from the end), magic, what it is, its name for qemu-img or None.
_OTHER_FORMATS: tuple[tuple[int, bytes, str, str | None], ...] = (
    (0, b"KDMV", "a VMDK disk", "vmdk"),
    (0, b"COWD", "a VMDK disk", "vmdk"),
    (0, b"# Disk DescriptorFile", "a VMDK descriptor", "vmdk"),
    (0x40, b"\x7f\x10\xda\xbe", "a VDI disk", "vdi"),
    (0, b"vhdxfile", "a VHDX disk", "vhdx"),
    (0, b"conectix", "a VHD disk", "vpc"),
    (-512, b"conectix", "a VHD disk", "vpc"),
    (-511, b"conectix", "a VHD disk", "vpc"),
    (0, b"QED\0", "a QED disk", "qed"),
    (0, b"WithoutFreeSpace", "a Parallels disk", "parallels"),
    (0, b"WithouFreSpacExt", "a Parallels disk", "parallels"),
    (0, b"Bochs Virtual HD Image", "a Bochs disk", "bochs"),
    (-512, b"koly", "a macOS disk image", "dmg"),
)
_COMPRESSED: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b\x08", "gzip", "gunzip"),
    (b"\xfd7zXZ\0", "xz", "unxz"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
    (b"BZh", "bzip2", "bunzip2"),
    (b"PK\x03\x04", "zip", "unzip"),
)
_ISO_MAGIC, _ISO_MAGIC_AT = b"CD001", 0x8001


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """What a disk image is. allocated_bytes is its share of the host's disk."""

    format: DiskFormat
    virtual_size_bytes: int
    allocated_bytes: int
    firmware: Firmware


async def inspect_disk(path: Path) -> DiskFacts:
    """The facts of a disk image that is safe to use as it is.

    Raises InvalidField (`fields["image"]` is the reason) for everything else: no regular file,
    another format, a damaged or encrypted image, or one that points to other files.
    """
    return await run_to_end(lambda: inspect_disk_blocking(path))


def inspect_disk_blocking(path: Path, *, shown_as: Path | None = None) -> DiskFacts:
    """`inspect_disk` for threads; shown_as is the user's name of a copy at `path`."""
    shown = shown_as or path
    path = path.absolute()
    try:
        with open_image(path, shown_as=shown) as fd:
            disk_format, virtual_bytes = find_format(fd, shown)
            allocated_bytes = os.fstat(fd).st_blocks * 512
            first = os.pread(fd, FIRST_BYTES, 0)
        if disk_format is DiskFormat.QCOW2:
            _check_tables(path)
            first = read_qcow2(path, 0, min(FIRST_BYTES, virtual_bytes))
    except UnfitImage as error:
        raise refuse(shown, str(error), error.hint) from error
    except ToolFailed as error:
        reason = error.message.replace(str(path), str(shown))
        raise refuse(shown, f"it does not pass the check: {reason}") from error
    return DiskFacts(disk_format, virtual_bytes, allocated_bytes, plan_firmware(first))


def refuse(shown: Path, reason: str, hint: str | None = None) -> InvalidField:
    """The error that says why the file which the user calls `shown` is not taken."""
    message = f"The image {shown} cannot be used: {reason}"
    return InvalidField(message, hint=hint, fields={"image": reason})


@contextlib.contextmanager
def open_image(path: Path, *, shown_as: Path) -> Iterator[int]:
    """A descriptor of the regular file at `path`; InvalidField if it is none or unreadable."""
    try:
        # Asked before opening: opening a FIFO waits, and opening a device can act on it.
        _check_regular(path.stat(), shown_as)
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise refuse(shown_as, "it does not exist") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise refuse(shown_as, f"it cannot be read: {reason}") from error
    try:
        _check_regular(os.fstat(fd), shown_as)
        yield fd
    finally:
        os.close(fd)


def _check_regular(found: os.stat_result, shown: Path) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise refuse(shown, "it is a directory")
    if not stat.S_ISREG(found.st_mode):
        raise refuse(shown, "it is no regular file")
    if found.st_size == 0:
        raise refuse(shown, "it is empty")


def find_format(fd: int, shown: Path) -> tuple[DiskFormat, int]:
    """The format and virtual size in bytes of an open file; UnfitImage if it is no usable disk.

    Only the file itself is read, so this can judge a large file before it is copied.
    """
    file_bytes = os.fstat(fd).st_size
    head = os.pread(fd, min(qcow2.HEAD_BYTES, file_bytes), 0)
    if head.startswith(qcow2.MAGIC):
        if shown.suffix.lower() in _RAW_NAMES:
            raise UnfitImage(
                "its name says raw disk, yet it begins with a qcow2 header, which a guest could "
                "have written there to read files of the host",
                f"if it really is a qcow2 image, rename it to {shown.stem}.qcow2",
            )
        return DiskFormat.QCOW2, qcow2.parse_header(head, file_bytes).virtual_size_bytes
    _check_other_formats(fd, file_bytes, head)
    if file_bytes < 512:
        raise UnfitImage(f"with {file_bytes} bytes it is too small for a disk")
    if file_bytes > qcow2.MAX_VIRTUAL_BYTES:
        raise UnfitImage(f"it has {file_bytes} bytes; at most 64 TB are taken")
    # QEMU pads the last sector of a raw file with zeros.
    return DiskFormat.RAW, -(-file_bytes // 512) * 512


def is_iso(fd: int) -> bool:
    """Whether the open file is an ISO 9660 image."""
    return os.pread(fd, len(_ISO_MAGIC), _ISO_MAGIC_AT) == _ISO_MAGIC


def _check_other_formats(fd: int, file_bytes: int, head: bytes) -> None:
    for offset, magic, what, tool_name in _OTHER_FORMATS:
        at = offset if offset >= 0 else file_bytes + offset
        if at >= 0 and os.pread(fd, len(magic), at) == magic:
            raise UnfitImage(
                f"it is {what}", f"convert it: qemu-img convert -f {tool_name} -O qcow2 OLD NEW"
            )
    for magic, what, tool in _COMPRESSED:
        if head.startswith(magic):
            raise UnfitImage(f"it is compressed with {what}", f"unpack it first, with {tool}")
    if head.startswith(b"LUKS\xba\xbe"):
        raise UnfitImage("it is an encrypted (LUKS) disk")
    if is_iso(fd):
        raise UnfitImage(
            "it is an ISO, most likely an installer and no installed disk",
            "create the VM without an image and run it with this file as `mount`",
        )


def _check_tables(path: Path) -> None:
    try:
        _qemu_img("check", "-q", "-f", "qcow2", str(path))
    except ToolFailed as error:
        if error.fields.get("exitStatus") != _LEAKS_ONLY:
            raise


def read_qcow2(path: Path, offset: int, length: int) -> bytes:
    """What the guest sees in a range of a qcow2 disk: within its size, multiples of 512.

    Blocks for some 10 ms. Raises ToolFailed.
    """
    # `dd` cannot do it: before QEMU 10.1 its count is the place where it ends.
    source = {
        "driver": "raw",
        "offset": offset,
        "size": length,
        "file": {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}},
    }
    # Into memory: a server that is killed here leaves no file behind.
    memory = os.memfd_create("range")
    try:
        out = f"/proc/{os.getpid()}/fd/{memory}"
        _qemu_img("convert", "-O", "raw", f"json:{json.dumps(source)}", out)
        return os.pread(memory, length, 0)
    finally:
        os.close(memory)


def _qemu_img(*arguments: str) -> None:
    program = get_program("qemu-img", package="qemu-utils")
    run_tool_blocking([program, *arguments], timeout_s=_TIMEOUT_S, limits=_LIMITS)
