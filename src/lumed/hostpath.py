"""Host directories that a user wants to share: which of them may be, and under which path."""

from __future__ import annotations

import os
from pathlib import Path

from lumed.errors import InvalidField

# File systems that are a way into the kernel rather than a place for files.
_KERNEL_FOLDERS = ("/proc", "/sys", "/dev")


def check_host_path(text: str) -> Path:
    """The absolute, real path of an existing directory. Blocks for a few metadata calls.

    "~" is the server user's home. A path that passes through a symbolic link is refused, and
    the hint names the directory behind it: what is shared is then what the user typed.
    Raises InvalidField (hostPath).
    """
    if not text or not text.isprintable():
        # Line ends and NUL also cannot be passed on to QEMU.
        raise _invalid(text, "is empty" if not text else "has unprintable characters")
    expanded = Path(text)
    if text.startswith("~"):
        home, _, rest = text.partition("/")
        base = os.path.expanduser(home)  # noqa: PTH111  (Path's raises where this returns "~x")
        if base == home:
            raise _invalid(text, f"names a home that does not exist: {home}")
        # Many sites reach /home through a link; that is not the user's doing.
        expanded = Path(os.path.realpath(base)) / rest
    if not expanded.is_absolute():
        raise _invalid(text, "is not absolute", hint="start it with / or ~/")
    path = Path("/" + os.path.normpath(expanded).lstrip("/"))
    try:
        real = path.resolve(strict=True)
    except FileNotFoundError as error:
        raise _invalid(text, "does not exist") from error
    except PermissionError as error:
        raise _invalid(text, "cannot be reached by this server's user") from error
    except (OSError, RuntimeError) as error:
        # Python 3.11 and 3.12 report a loop of links as RuntimeError.
        raise _invalid(text, f"cannot be used: {error}") from error
    if real != path:
        raise _invalid(text, f"leads through a symbolic link to {real}", hint=f"use {real}")
    if not path.is_dir():
        raise _invalid(text, "is not a directory")
    if not os.access(path, os.R_OK | os.X_OK):
        raise _invalid(text, "cannot be read by this server's user")
    if path == Path("/") or any(path.is_relative_to(folder) for folder in _KERNEL_FOLDERS):
        raise _invalid(
            text, "belongs to the kernel or contains its files", hint="share a directory of files"
        )
    return path


def _invalid(text: str, reason: str, *, hint: str | None = None) -> InvalidField:
    shown = text if len(text) <= 200 else text[:200] + "…"
    return InvalidField(f"hostPath {shown!r} {reason}", hint=hint, fields={"hostPath": reason})
