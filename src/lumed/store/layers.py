"""Disks that share their past: what a clone and its source have in common lies in layers.

    <vm>/disk.qcow2            what this VM has written since the last clone
    <vm>/layer-<id>.qcow2      what it had written before, never changed again (0444)
    the cached image           the bottom of the chain; none under a disk that was made empty

A layer is one file with a name (a hard link) in the folder of every VM that rests on it: the
kernel counts them, so a VM is deleted by removing its folder, in whatever order, and no list of
users can be wrong. Each file names the next one without a folder, so the chain stays whole when
a VM's folder is renamed. docs/decisions/0005 has the alternatives.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lumed.claim import is_written_by_qemu, refuse_qemu_writes
from lumed.errors import Damaged, WrongState
from lumed.files import full_disk_is_no_space, sync_dir, sync_file
from lumed.model.vm import DiskFormat
from lumed.store.disk import create_on_layer, qemu_img, read_usage

# Each layer costs reads: 20,000 of 4 KiB took 0.11 s over 8 layers, 0.23 over 16, 0.5 over 32,
# 1.6 over 64, and a start opens 16 in 18 ms (QEMU 7.2).
MOST_LAYERS = 16
_CHAIN_LIMIT = 256

_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)

# qcow2.txt, "Header": magic, version, offset and length of the backing file's name.
_HEAD = struct.Struct(">4sIQI")
_EXTENSIONS_AT = 100  # holds the header's length; version 2 has none and is always 72 bytes
_BACKING_FORMAT = 0xE2792ACA


@dataclass(frozen=True, slots=True)
class Backing:
    """What a qcow2 file rests on: a name without a folder is a layer beside it."""

    name: str
    format: DiskFormat


def read_backing(disk: Path) -> Backing | None:
    """What the qcow2 file `disk` rests on. Raises Damaged if it is none or cannot be read."""
    try:
        with disk.open("rb") as file:
            head = file.read(1024)
            magic, version, offset, length = _HEAD.unpack_from(head)
            if magic != b"QFI\xfb" or length > 1023:
                raise ValueError("its header is gone")
            if offset == 0:
                return None
            file.seek(offset)
            name = os.fsdecode(file.read(length))
            return Backing(name, _read_backing_format(head, version))
    except OSError as error:
        raise Damaged(f"The disk {disk} cannot be read: {error.strerror}") from error
    except (ValueError, struct.error) as error:
        raise Damaged(f"{disk} is no qcow2 disk that names what it rests on: {error}") from error


def _read_backing_format(head: bytes, version: int) -> DiskFormat:
    at = struct.unpack_from(">I", head, _EXTENSIONS_AT)[0] if version >= 3 else 72
    while True:
        kind, length = struct.unpack_from(">II", head, at)
        if kind == _BACKING_FORMAT:
            return DiskFormat(head[at + 8 : at + 8 + length].decode())
        if kind == 0:
            raise ValueError("no backing format")
        at += 8 + -(-length // 8) * 8


def read_layers(disk: Path) -> tuple[Path, ...]:
    """The layers that a disk rests on, the newest first; some 20 µs each. Raises as read_backing.

    A file whose backing is named with a folder is the last one: that is the cached image.
    """
    layers: list[Path] = []
    file = disk
    while (backing := read_backing(file)) is not None and "/" not in backing.name:
        file = disk.with_name(backing.name)
        layers.append(file)
        if len(layers) > _CHAIN_LIMIT:
            raise Damaged(f"The layers of {disk} have no end")
    return tuple(layers)


def find_image(disk: Path) -> Backing | None:
    """The image under a disk and all its layers; None if it was made empty."""
    return read_backing((disk, *read_layers(disk))[-1])


@contextlib.contextmanager
def hold_still(disk: Path) -> Iterator[int]:
    """Open a disk for reading and keep QEMU, of any server, from writing to it meanwhile.

    Yields the descriptor. Raises WrongState if a process has it open for writing, Damaged.
    """
    try:
        fd = os.open(disk, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise Damaged(f"The disk {disk} cannot be read: {error.strerror}") from error
    try:
        # Refused first, then looked: a QEMU that starts in between sees our lock and gives up.
        if not refuse_qemu_writes(fd) or is_written_by_qemu(fd):
            raise WrongState(
                f"The disk {disk} is in use by a running machine", hint="stop the VM first"
            )
        yield fd
    finally:
        os.close(fd)


def link_file(source: Path, target: Path) -> bool:
    """Give a file a second name; False where that cannot be (another file system, too many)."""
    try:
        with full_disk_is_no_space(target.parent, f"link {target.name}"):
            target.hardlink_to(source)
    except OSError as error:
        if error.errno in _NO_LINK:
            return False
        raise
    return True


def new_layer(folder: Path) -> Path:
    """A name for a layer."""
    return folder / f"layer-{secrets.token_hex(8)}.qcow2"


def freeze(disk: Path) -> None:
    """Turn all that a disk holds into a layer; the disk is then an empty overlay of it.

    The caller holds it still. A kill or power cut on the way leaves the disk as it was or as it
    shall be; only a second name of it may stay, which `rest_on` removes the next time.
    """
    layer = new_layer(disk.parent)
    if not link_file(disk, layer):
        raise WrongState(f"{disk.parent} is on a file system without hard links")
    rest_on(disk, layer)


def rest_on(disk: Path, layer: Path) -> None:
    """Replace a disk by an empty overlay of `layer`, which is beside it and has all its data."""
    fresh = disk.with_name("next.qcow2")
    fresh.unlink(missing_ok=True)
    # Makes the layer's name durable, too: until then it may be the only one of the data below.
    create_on_layer(fresh, layer, read_usage(disk).virtual_bytes)
    fresh.rename(disk)
    sync_dir(disk.parent)
    remove_strays(disk)


def remove_strays(disk: Path) -> None:
    """Remove the layers in a disk's folder that the disk does not rest on."""
    used = {layer.name for layer in read_layers(disk)}
    for file in disk.parent.glob("layer-*.qcow2"):
        if file.name not in used:
            file.unlink()


def flatten(layer: Path, *, stop: threading.Event, timeout_s: float) -> None:
    """Take all the data of the layers below into `layer`, a copy of a disk beside them.

    It then rests on the image alone (or on nothing). Takes as long as copying that data.
    Raises NoSpace, or Stopped soon after `stop` is set; the file is then good for nothing.
    """
    image = find_image(layer)
    # Reads and compares only what is not the image's own.
    onto = ["-b", ""] if image is None else ["-b", image.name, "-F", image.format]
    arguments = ("rebase", "-q", "-f", "qcow2", *onto, str(layer))
    qemu_img(*arguments, disk=layer, timeout_s=timeout_s, stop=stop)
    sync_file(layer)
