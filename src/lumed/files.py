"""Files that are whole or absent, whatever happens on the way."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from pathlib import Path

from lumed.errors import NoSpace


def write_atomic(path: Path, data: bytes, mode: int = 0o600, *, durable: bool = True) -> None:
    """Replace a file's content: after a crash it holds the old or the new, never a mixture.

    durable also waits for the device (about 6 ms), so that the new content survives a power cut;
    without it, it survives the death of any process.
    Raises NoSpace when the file system (or quota) is full; the old content is then untouched.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        temporary.rename(path)
        if durable:
            fsync_dir(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise_no_space(error, path.parent)
        raise


def fsync_dir(directory: Path) -> None:
    """Make renames and new names in a directory survive a power cut (fsync(2))."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def raise_no_space(error: OSError, where: Path) -> None:
    """Raise NoSpace if that is what the error says; return otherwise."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise NoSpace(
            f"No space left in {where}", hint="free some space or choose another storage"
        ) from error


def write_json(path: Path, value: object, *, durable: bool = True) -> None:
    """`write_atomic` of a JSON text, indented for people."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomic(path, text.encode(), durable=durable)


def read_json_object(path: Path) -> dict[str, object]:
    """A JSON object from a file. Raises OSError or ValueError."""
    value = json.loads(path.read_bytes())
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return value


def make_private_dir(path: Path) -> Path:
    """Make a directory (and its parents) that only its owner can enter; mend its mode."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path
