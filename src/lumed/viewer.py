"""What virt-viewer is given to open a window on a machine's screen."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


def has_desktop() -> bool:
    """Whether this process could open a window at all."""
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


@contextlib.contextmanager
def open_settings(port: int, password: str, title: str) -> Iterator[int]:
    """A descriptor to be standard input of `remote-viewer -`: settings for a VNC port of this host.

    So the password is in no argv, and in no file that would stay where no window can be opened.
    """
    settings = os.memfd_create("viewer")
    try:
        os.write(settings, plan_settings(port, password, title))
        os.lseek(settings, 0, os.SEEK_SET)
        yield settings
    finally:
        os.close(settings)


def plan_settings(port: int, password: str, title: str) -> bytes:
    """See remote-viewer(1), CONNECTION FILE."""
    return (
        f"[virt-viewer]\ntype=vnc\nhost=127.0.0.1\nport={port}\npassword={password}\n"
        f"title={title}\n"
    ).encode()
