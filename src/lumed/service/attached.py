"""What a run attaches beside the VM's own disk: checked, since the user names any file."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from lumed.claim import is_written_by_qemu
from lumed.errors import InvalidField, WrongState
from lumed.files import expand_path
from lumed.images.inspect import find_format, is_iso, open_image
from lumed.images.qcow2 import UnfitImage
from lumed.model.run import AttachedDisk
from lumed.model.vm import DiskFormat


def check_iso(text: str) -> str:
    """The real path of the file that `mount` names. Raises InvalidField."""
    try:
        path = expand_path(text)
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("is no regular file")
        if not os.access(path, os.R_OK):
            raise ValueError("cannot be read by this server's user")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InvalidField(f"mount {text!r:.200} {reason}", fields={"mount": reason}) from error
    return str(path.resolve())


def check_disks(
    disks: Sequence[str], usb_storage: Sequence[str], own_disk: Path
) -> tuple[tuple[AttachedDisk, ...], tuple[AttachedDisk, ...]]:
    """The disk images that a run names, and how to open them.

    Raises InvalidField (`disks` or `usbStorage`), WrongState if a machine writes to one.
    """
    seen: dict[tuple[int, int], str] = {}
    with contextlib.suppress(FileNotFoundError):  # the machine's start will say so
        seen[_identify(own_disk.stat())] = "it is the VM's own disk"
    return (
        tuple(_check_all("disks", disks, seen)),
        tuple(_check_all("usbStorage", usb_storage, seen)),
    )


def check_vnc_port(port: int) -> None:
    """Raise InvalidField if the port is taken now; QEMU would only say that it found none."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen(1)
        except OSError as error:
            reason = f"{port} is in use" if error.errno == errno.EADDRINUSE else error.strerror
            raise InvalidField(
                f"vncPort: {reason}",
                hint="without vncPort a free one is taken",
                fields={"vncPort": reason},
            ) from error


def _check_all(
    field: str, texts: Sequence[str], seen: dict[tuple[int, int], str]
) -> Iterator[AttachedDisk]:
    for text in texts:
        try:
            yield _check_disk(text, seen, read_only=field == "usbStorage")
        except (UnfitImage, ValueError) as error:
            hint = error.hint if isinstance(error, UnfitImage) else None
            raise _refuse(field, text, str(error), hint) from error
        except InvalidField as error:
            raise _refuse(field, text, str(error.fields["image"]), error.hint) from error


def _check_disk(text: str, seen: dict[tuple[int, int], str], *, read_only: bool) -> AttachedDisk:
    path = expand_path(text).resolve()
    with open_image(path, shown_as=path) as fd:
        found = os.fstat(fd)
        if reason := seen.get(_identify(found)):
            raise UnfitImage(reason)
        seen[_identify(found)] = "it is named twice"
        disk_format = DiskFormat.RAW
        if not (read_only and is_iso(fd)):
            disk_format, _ = find_format(fd, path)
        if not read_only:
            # Root may write to everything; the images that VMs rest on are marked by their mode.
            if not found.st_mode & 0o222 or not os.access(path, os.W_OK):
                raise UnfitImage("it is write-protected")
            if is_written_by_qemu(fd):
                raise WrongState(f"{path} is the disk of a machine that runs")
    return AttachedDisk(str(path), disk_format)


def _identify(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _refuse(field: str, text: str, reason: str, hint: str | None) -> InvalidField:
    return InvalidField(
        f"{field}: {text!r:.200} cannot be attached: {reason}", hint=hint, fields={field: reason}
    )
