"""A relay between QEMU and an old passt that makes up for two of its faults.

Both were seen with Debian 12's passt of March 2023, and neither with those of 2025 and 2026:

- For a guest that writes 127.0.0.1 into a frame by hand it connects to the host's loopback,
  whatever --no-map-gw says, and so lets the guest's root user drive lumed's API and everything
  else there. Later ones drop such frames; for the old one they are dropped here.
- It leaves a guest's SYN-ACK unanswered until the client outside has sent something. So the
  guest's server never sees the connection if it is the one to speak first, as with VNC, SMTP,
  or whoever waits for an SSH banner. The missing acknowledgement is made here.

It is run as a program of its own (`python -I -S passt_guard.py GUEST_FD PASST_FD`), since it
must live as long as the machine and not as long as the server. Either socket carries Ethernet
frames, each after its length as four bytes, big-endian; either one's end ends it.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import threading
import time

_ARP = b"\x08\x06"
_IPV4 = b"\x08\x00"
_TCP = 6
_SYN_ACK, _ACK = 0x12, 0x10
_LARGEST_FRAME = 65_536 + 18
_BUFFER = 1 << 18
_SIOCOUTQ = 0x5411
_READ_TIMEOUT_S, _READ_STEP_S = 1.0, 0.0002


def is_allowed(frame: bytes | memoryview) -> bool:
    """Whether passt may see this frame: ARP, or IPv4 that no loopback address is part of.

    0.0.0.0/8 counts as loopback: connect(2) to 0.0.0.0 reaches 127.0.0.1. Bytes 26 and 30 are
    the first ones of the IPv4 source and destination; a DHCP client's source is 0.0.0.0.
    """
    kind = frame[12:14]
    if kind == _IPV4:
        return len(frame) >= 34 and frame[26] != 127 and frame[30] not in (0, 127)
    return kind == _ARP


def make_missing_ack(frame: bytes | memoryview) -> bytes | None:
    """The frame that acknowledges a guest's SYN-ACK; None for every other frame."""
    if len(frame) < 54 or frame[12:14] != _IPV4 or frame[23] != _TCP:
        return None
    start = 14 + (frame[14] & 15) * 4
    if len(frame) < start + 20 or frame[start + 13] & 0x3F != _SYN_ACK:
        return None
    guest_port, port, guest_seq, seq = struct.unpack_from("!HHII", frame, start)
    ends = bytes(frame[30:34]) + bytes(frame[26:30])
    # A window of 256, which is 64 KiB by the scale that passt offers, until its own first word.
    acknowledged = (guest_seq + 1) & 0xFFFFFFFF
    tcp = struct.pack("!HHIIBBHHH", port, guest_port, seq, acknowledged, 5 << 4, _ACK, 256, 0, 0)
    checksum = _add_up(ends + struct.pack("!HH", _TCP, len(tcp)) + tcp)
    tcp = tcp[:16] + checksum + tcp[18:]
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0x4000, 255, _TCP, 0) + ends
    header = header[:10] + _add_up(header) + header[12:]
    return bytes(frame[6:12]) + bytes(frame[:6]) + _IPV4 + header + tcp


def _add_up(data: bytes) -> bytes:
    """The internet checksum (RFC 1071) of an even number of bytes."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)


class Link:
    """One of the two sockets; both threads may write whole frames to it."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self._turn = threading.Lock()

    def send(self, frames: bytes | memoryview) -> None:
        """Write frames, each with its length before it."""
        with self._turn:
            self.end.sendall(frames)

    def count_unread(self) -> int:
        """0 if the other side has read everything (SIOCOUTQ, unix(7)), else more."""
        return int(struct.unpack("i", fcntl.ioctl(self.end, _SIOCOUTQ, bytes(4)))[0])


class Guard:
    """What is done to the frames from the guest to passt."""

    def __init__(self, guest: Link, passt: Link) -> None:
        self._guest = guest
        self._passt = passt
        self._acks = b""

    def is_kept(self, frame: memoryview) -> bool:
        """Whether passt may see the frame; remembers what is to be acknowledged."""
        ack = make_missing_ack(frame)
        if ack is not None:
            self._acks += struct.pack("!I", len(ack)) + ack
        return is_allowed(frame)

    def acknowledge(self) -> None:
        """Acknowledge the SYN-ACKs that were passed on, once passt has taken them in.

        Not before: if it reads a SYN-ACK and data of the same connection at once, it counts
        packets below zero and runs in a circle for good (tap4_handler of March 2023). After a
        second of waiting the guest is left to send its SYN-ACK again.
        """
        if not self._acks:
            return
        acks, self._acks = self._acks, b""
        deadline = time.monotonic() + _READ_TIMEOUT_S
        while self._passt.count_unread():
            if time.monotonic() > deadline:
                return
            time.sleep(_READ_STEP_S)
        self._guest.send(acks)


def relay(source: Link, sink: Link, guard: Guard | None = None) -> None:
    """Pass on frames, those that the guard keeps, until a socket ends or the framing is broken.

    A read usually holds many frames; they go out in as few writes as the dropped ones allow.
    """
    view = memoryview(bytearray(_BUFFER))
    filled = 0
    while count := source.end.recv_into(view[filled:]):
        filled += count
        unsent = position = 0
        while position + 4 <= filled:
            start = position + 4
            end = start + int.from_bytes(view[position:start], "big")
            if end - start > _LARGEST_FRAME:
                return
            if end > filled:
                break
            if guard is not None and not guard.is_kept(view[start:end]):
                sink.send(view[unsent:position])
                unsent = end
            position = end
        sink.send(view[unsent:position])
        if guard is not None:
            guard.acknowledge()
        view[: filled - position] = bytes(view[position:filled])
        filled -= position


def main(guest_fd: int, passt_fd: int) -> None:
    """Relay both ways until either socket ends."""
    guest = Link(socket.socket(fileno=guest_fd))
    passt = Link(socket.socket(fileno=passt_fd))
    # A thread for each way: one loop that waits to write would keep passt waiting for it to read.
    threading.Thread(target=_run, args=(passt, guest), daemon=True).start()
    _run(guest, passt, Guard(guest, passt))


def _run(source: Link, sink: Link, guard: Guard | None = None) -> None:
    try:
        relay(source, sink, guard)
    except OSError:
        pass  # the other end closed while we wrote, which ends us like its closing does
    finally:
        # Not sys.exit: the other thread sits in a read, and its end is of no use to anybody.
        os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
