"""A relay between QEMU and passt that drops what the guest sends to the host's loopback.

passt before its change "tap: Disallow loopback addresses on tap interface" (end of 2023) opens
a connection to 127.0.0.1 for a guest that puts this address into a frame by hand, whatever
--no-map-gw says: seen with Debian 12's. Every service on the host's loopback, lumed's API
included, would be open to a guest's root user. So such a passt never gets to see these frames.

It is run as a program of its own (`python -I -S loopback_filter.py GUEST_FD PASST_FD`), since
it must live as long as the machine and not as long as the server. Either socket carries
Ethernet frames, each after its length as four bytes, big-endian; either one's end ends it.
"""

from __future__ import annotations

import os
import socket
import sys
import threading

TYPE_CHECKING = False  # as typing has it; importing typing would double the start-up time
if TYPE_CHECKING:
    from collections.abc import Callable

_ARP = b"\x08\x06"
_IPV4 = b"\x08\x00"
_LARGEST_FRAME = 65_536 + 18
_BUFFER = 1 << 18


def is_allowed(frame: bytes | memoryview) -> bool:
    """Whether passt may see this frame: ARP, or IPv4 that no loopback address is part of.

    0.0.0.0/8 counts as loopback: connect(2) to 0.0.0.0 reaches 127.0.0.1. Bytes 26 and 30 are
    the first ones of the IPv4 source and destination; a DHCP client's source is 0.0.0.0.
    """
    kind = frame[12:14]
    if kind == _IPV4:
        return len(frame) >= 34 and frame[26] != 127 and frame[30] not in (0, 127)
    return kind == _ARP


def relay_guest(guest: socket.socket, passt: socket.socket) -> None:
    """Pass on the guest's allowed frames, until either end closes or the guest breaks the framing.

    A read usually holds many frames; they go out in as few writes as the dropped ones allow.
    """
    view = memoryview(bytearray(_BUFFER))
    filled = 0
    while count := guest.recv_into(view[filled:]):
        filled += count
        unsent = position = 0
        while position + 4 <= filled:
            start = position + 4
            size = int.from_bytes(view[position:start], "big")
            if size > _LARGEST_FRAME:
                return
            if start + size > filled:
                break
            if not is_allowed(view[start : start + size]):
                passt.sendall(view[unsent:position])
                unsent = start + size
            position = start + size
        passt.sendall(view[unsent:position])
        view[: filled - position] = bytes(view[position:filled])
        filled -= position


def relay_passt(passt: socket.socket, guest: socket.socket) -> None:
    """Pass on everything that is meant for the guest."""
    view = memoryview(bytearray(_BUFFER))
    while count := passt.recv_into(view):
        guest.sendall(view[:count])


def main(guest_fd: int, passt_fd: int) -> None:
    """Relay both ways until either end closes."""
    guest = socket.socket(fileno=guest_fd)
    passt = socket.socket(fileno=passt_fd)

    # A thread for each way: one loop that waits to write would keep passt waiting for it to read.
    threading.Thread(target=_run, args=(relay_passt, passt, guest), daemon=True).start()
    _run(relay_guest, guest, passt)


def _run(
    relay: Callable[[socket.socket, socket.socket], None],
    source: socket.socket,
    sink: socket.socket,
) -> None:
    try:
        relay(source, sink)
    except OSError:
        pass  # the other end closed while we wrote, which ends us like its closing does
    finally:
        # Not sys.exit: the other thread sits in a read, and its end is of no use to anybody.
        os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
