"""libvirt's QEMU driver, private to one process: `/usr/bin/python3 libvirt_peer.py ROOT XML`.

The driver runs embedded in this program (`qemu:///embed`), so there is no daemon to start, and
what a daemon's socket would cost is not counted. Debian has the binding for its own Python only,
hence a program of its own: it obeys "start" and "stop" on standard input, a line each, and
answers each with a line when done.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from pathlib import Path

import libvirt


def _follow_events() -> None:
    while True:
        libvirt.virEventRunDefaultImpl()


_PR_SET_CHILD_SUBREAPER = 36


def _reap_orphans() -> None:
    """Go on as a child, while the parent reaps the QEMUs that the child leaves behind.

    libvirt takes a zombie for a living process, and the init of a container or a small virtual
    machine may take a second to reap one: destroy then took 1.2 to 2 s instead of 0.2.
    """
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    child = os.fork()
    if child == 0:
        return
    while os.wait()[0] != child:
        pass
    os._exit(0)


def main(root: str, xml: str) -> None:
    """Define the domain and obey until the end of input; the domain is ended then."""
    _reap_orphans()
    libvirt.virEventRegisterDefaultImpl()
    threading.Thread(target=_follow_events, daemon=True).start()
    connection = libvirt.open(f"qemu:///embed?root={root}")
    domain = connection.defineXML(Path(xml).read_text())
    print("libvirt", connection.getLibVersion(), flush=True)
    try:
        for line in sys.stdin:
            if line.strip() == "start":
                domain.create()
            else:
                domain.destroy()
            print("done", flush=True)
    finally:
        if domain.isActive():
            domain.destroy()


if __name__ == "__main__":
    main(*sys.argv[1:])
