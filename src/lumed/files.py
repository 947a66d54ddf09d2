"""Files that are whole or absent whatever happens, and space that runs out.

All of it blocks, for microseconds to milliseconds: call it from threads.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

from lumed.errors import NoSpace
from lumed.units import describe_size

_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)


def write_atomic(path: Path, data: bytes, mode: int = 0o600, *, durable: bool = True) -> None:
    """Replace a file's content: after a crash it holds the old or the new, never a mixture.

    durable also waits for the device (about 6 ms), so that the new content survives a power cut;
    without it, it survives the death of any process.
    Raises NoSpace when the file system (or quota) is full; the old content is then untouched.
    """
    new = path.with_name(f".{path.name}.{os.urandom(4).hex()}.new")
    try:
        with full_disk_is_no_space(path.parent, f"write {path.name}"):
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(fd)
            new.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise
    if durable:
        sync_dir(path.parent)


def write_json(path: Path, value: object, *, durable: bool = True) -> None:
    """`write_atomic` of a JSON text, indented for people."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomic(path, text.encode(), durable=durable)


def read_json_object(path: Path) -> dict[str, object]:
    """A JSON object from a file. Raises OSError or ValueError."""
    try:
        value = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return value


def expand_path(text: str) -> Path:
    """A path as a person writes it, absolute or below "~". Raises ValueError that says why not."""
    if "\0" in text:
        raise ValueError("holds a NUL character")
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError("names a home that does not exist") from error
    if not path.is_absolute():
        raise ValueError("is not absolute; start it with / or ~/")
    return path


def sync_dir(path: Path) -> None:
    """Make the names in a directory durable (fsync(2) of the directory)."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def sync_file(path: Path) -> None:
    """Make a file's data and size durable, whoever wrote it."""
    _sync(path, os.O_RDONLY | os.O_NOFOLLOW)


def _sync(path: Path, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: memoryview, at: int) -> None:
    """pwrite(2) all of `data`."""
    while data:
        count = os.pwrite(fd, data, at)
        data = data[count:]
        at += count


def check_free_space(
    directory: Path, needed_bytes: int, what: str, *, where: str | None = None
) -> None:
    """Raise NoSpace if the file system of `directory` has less than needed_bytes left for us.

    what completes "Not enough space in … to"; where is the location's name, if it has one.
    Blocks reserved for root do not count (statvfs(3), f_bavail).
    """
    state = os.statvfs(directory)
    free_bytes = state.f_bavail * state.f_frsize
    if free_bytes < needed_bytes:
        raise NoSpace(
            f"Not enough space in {where or directory} to {what}: "
            f"needs {describe_size(needed_bytes)}, has {describe_size(free_bytes)}",
            hint="free some space, choose a smaller diskSize or another storage",
            fields={"neededBytes": needed_bytes, "freeBytes": free_bytes},
        )


@contextlib.contextmanager
def full_disk_is_no_space(directory: Path, what: str) -> Iterator[None]:
    """Turn the OSError of a full disk or quota into NoSpace; what as in check_free_space."""
    try:
        yield
    except OSError as error:
        if error.errno not in _OUT_OF_SPACE:
            raise
        raise NoSpace(
            f"Not enough space in {directory} to {what}: {error.strerror}",
            hint="free some space or choose another storage",
        ) from error
