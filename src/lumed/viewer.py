"""What virt-viewer is given to open a window on a machine's screen."""

from __future__ import annotations

import os


def has_desktop() -> bool:
    """Whether this process could open a window at all."""
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def plan_settings(port: int, password: str, title: str) -> bytes:
    """A remote-viewer(1) file for a VNC port of this host, which the viewer removes itself.

    So the password is in a private file for a moment, and in no argv.
    """
    return (
        f"[virt-viewer]\ntype=vnc\nhost=127.0.0.1\nport={port}\npassword={password}\n"
        f"title={title}\ndelete-this-file=1\n"
    ).encode()
