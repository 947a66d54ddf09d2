"""The token that a server asks for on its TCP ports: in a file that only its owner can read.

The file is `token` in the home, or the one of `--token-file`. The unix socket asks for none: there
the kernel says who asks.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from pathlib import Path

from lumed.errors import InvalidField
from lumed.files import write_atomic

# What a header can carry as one word.
_WORD = re.compile(rb"[!-~]+")
_LONGEST_BYTES = 4096


def make_token(path: Path) -> str:
    """Make a new token and keep it in a file of mode 0600; an old one is replaced."""
    token = secrets.token_urlsafe(32)
    write_atomic(path, f"{token}\n".encode())
    return token


def find_token(path: Path) -> str | None:
    """`read_token` of a file that need not be there."""
    return read_token(path) if os.path.lexists(path) else None


def read_token(path: Path) -> str:
    """The token in a file. Raises InvalidField if it holds none, or if others can read it."""
    try:
        # A FIFO would keep us waiting for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _unusable(path, "it is a link; name the file itself") from error
        raise _unusable(path, f"{error.strerror}") from error
    try:
        _check_owner(path, os.fstat(fd))
        content = os.read(fd, _LONGEST_BYTES + 1).strip()
    finally:
        os.close(fd)
    if not content:
        raise _unusable(path, "it is empty", hint="lume serve --new-token makes a token")
    if len(content) > _LONGEST_BYTES or not _WORD.fullmatch(content):
        raise _unusable(path, "a token is one word of ASCII letters, digits and signs")
    return content.decode("ascii")


def _check_owner(path: Path, state: os.stat_result) -> None:
    if not stat.S_ISREG(state.st_mode):
        raise _unusable(path, "it is no file")
    if state.st_uid not in (0, os.geteuid()):
        raise _unusable(path, f"it belongs to another user (uid {state.st_uid})")
    if state.st_mode & 0o077:
        raise _unusable(
            path,
            f"others can read or change it (mode {stat.S_IMODE(state.st_mode):04o})",
            hint=f"chmod 600 {path}",
        )


def _unusable(path: Path, reason: str, *, hint: str | None = None) -> InvalidField:
    return InvalidField(
        f"The token file {path} cannot be used: {reason}", hint=hint, fields={"tokenFile": reason}
    )
