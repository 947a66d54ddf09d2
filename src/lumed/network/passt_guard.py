"""A relay between QEMU and an old passt that makes up for five of its faults.

All were seen with Debian 12's passt of March 2023, and not with those of 2025 and 2026:

- For a guest that writes 127.0.0.1 into a frame by hand it connects to the host's loopback,
  whatever --no-map-gw says, and so lets the guest's root user drive lumed's API and everything
  else there. Later ones drop such frames; for the old one they are dropped here.
- It leaves a guest's SYN-ACK unanswered until the client outside has sent something. So the
  guest's server never sees the connection if it is the one to speak first, as with VNC, SMTP,
  or whoever waits for an SSH banner. The missing acknowledgement is made here.
- If one read of it ends up with a SYN and another segment of the same connection, such as the
  SYN sent again on a busy host, it counts packets below zero and runs in a circle for good
  (`n -= tcp_tap_handler()` in tap4_handler). So nothing follows a SYN before it was read.
- While a connection that the guest has not answered is given up by its client, it spins on the
  client's hang-up, for 10 s at 100 % of a core. So a SYN to a guest that has no address yet is
  refused here at once, as the guest's own system would once it is up.
- A guest's refusal becomes the bare end of a connection that was accepted, unless the client's
  request lies there unread: then the kernel makes a reset of it. Clients that poll until a server
  is there take a reset for "not yet", and a bare end for a broken server. So a refusal is held
  back here until a client that speaks first has had the time to.

It is run as a program of its own (`python -I -S passt_guard.py GUEST_FD PASST_FD`), since it
must live as long as the machine and not as long as the server. Either socket carries Ethernet
frames, each after its length as four bytes, big-endian; either one's end ends it.
"""

from __future__ import annotations

import fcntl
import os
import queue
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

_ARP = b"\x08\x06"
_IPV4 = b"\x08\x00"
_TCP, _UDP = 6, 17
_DHCP_SERVER = struct.pack("!H", 67)
_SYN, _RST, _ACK, _TCP_FLAGS = 0x02, 0x04, 0x10, 0x3F
_NOBODY = bytes(4)
_ANY_GUEST = bytes.fromhex("525400000001")
_LARGEST_FRAME = 65_536 + 18
_BUFFER = 1 << 18
_SIOCOUTQ = 0x5411
_READ_STEP_S = 0.0002
_REFUSAL_S = 0.1
_LONGEST_REFUSAL = 14 + 60 + 60  # Ethernet, and both headers with all options


def is_allowed(frame: bytes | memoryview) -> bool:
    """Whether passt may see this frame: ARP, or IPv4 that no loopback address is part of.

    0.0.0.0/8 counts as loopback: connect(2) to 0.0.0.0 reaches 127.0.0.1. Bytes 26 and 30 are
    the first ones of the IPv4 source and destination; a DHCP client's source is 0.0.0.0.
    """
    kind = frame[12:14]
    if kind == _IPV4:
        return len(frame) >= 34 and frame[26] != 127 and frame[30] not in (0, 127)
    return kind == _ARP


def tcp_flags(frame: bytes | memoryview) -> int:
    """The flags of a TCP segment; 0 for every other frame."""
    if len(frame) < 54 or frame[23] != _TCP or frame[12:14] != _IPV4:
        return 0
    flags = _tcp_start(frame) + 13
    return frame[flags] & _TCP_FLAGS if flags < len(frame) else 0


def _tcp_start(frame: bytes | memoryview) -> int:
    return 14 + (frame[14] & 15) * 4


def make_missing_ack(frame: bytes | memoryview) -> bytes | None:
    """The frame that acknowledges a guest's SYN-ACK; None for every other frame."""
    if tcp_flags(frame) != _SYN | _ACK:
        return None
    start = _tcp_start(frame)
    guest_port, port, guest_seq, seq = struct.unpack_from("!HHII", frame, start)
    # A window of 256, which is 64 KiB by the scale that passt offers, until its own first word.
    return _answer(frame, struct.pack("!HHII", port, guest_port, seq, _after(guest_seq)), _ACK, 256)


def make_refusal(frame: bytes | memoryview) -> bytes | None:
    """The reset that refuses a client's SYN; None for every other frame."""
    if tcp_flags(frame) != _SYN:
        return None
    start = _tcp_start(frame)
    port, guest_port, seq = struct.unpack_from("!HHI", frame, start)
    return _answer(frame, struct.pack("!HHII", guest_port, port, 0, _after(seq)), _RST | _ACK, 0)


def is_refusal(frame: bytes | memoryview) -> bool:
    """Whether a guest refuses a connection: such a reset has the sequence number 0 (RFC 9293)."""
    # A longer one is none, and would only fill our memory.
    if tcp_flags(frame) != _RST | _ACK or len(frame) > _LONGEST_REFUSAL:
        return False
    start = _tcp_start(frame)
    return frame[start + 4 : start + 8] == _NOBODY


def _after(sequence: int) -> int:
    return (sequence + 1) & 0xFFFFFFFF


def _answer(frame: bytes | memoryview, ports: bytes, flags: int, window: int) -> bytes:
    """A segment without data the other way; ports are the ports and the sequence numbers."""
    ends = bytes(frame[30:34]) + bytes(frame[26:30])
    tcp = ports + struct.pack("!BBHHH", 5 << 4, flags, window, 0, 0)
    checksum = _add_up(ends + struct.pack("!HH", _TCP, len(tcp)) + tcp)
    tcp = tcp[:16] + checksum + tcp[18:]
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0x4000, 255, _TCP, 0) + ends
    header = header[:10] + _add_up(header) + header[12:]
    # passt sends to everybody until it has heard of the guest, and nobody is called that.
    source = _ANY_GUEST if frame[0] & 1 else bytes(frame[:6])
    return bytes(frame[6:12]) + source + _IPV4 + header + tcp


def _add_up(data: bytes) -> bytes:
    """The internet checksum (RFC 1071) of an even number of bytes."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)


class Link:
    """One of the two sockets, as a stream of whole frames; both threads may write to it."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self._turn = threading.Lock()
        self._view = memoryview(bytearray(_BUFFER))
        self._filled = self._whole = 0

    def receive(self) -> memoryview:
        """The whole frames that have arrived, at least one; empty once the socket has ended.

        Each has its length before it. They stay in place until the next call.
        """
        view = self._view
        rest = self._filled - self._whole
        view[:rest] = bytes(view[self._whole : self._filled])
        self._filled, self._whole = rest, 0
        while not self._whole and (count := self.end.recv_into(view[self._filled :])):
            self._filled += count
            self._whole = max((end for _, end in split_frames(view[: self._filled])), default=0)
        return view[: self._whole]

    def send(self, frames: bytes | memoryview) -> None:
        """Write whole frames, each with its length before it."""
        with self._turn:
            self.end.sendall(frames)

    def count_unread(self) -> int:
        """0 if the other side has read everything (SIOCOUTQ, unix(7)), else more."""
        return int(struct.unpack("i", fcntl.ioctl(self.end, _SIOCOUTQ, bytes(4)))[0])

    def has_ended(self) -> bool:
        """Whether the other side has closed the socket."""
        poller = select.poll()
        poller.register(self.end, select.POLLHUP)
        return bool(poller.poll(0))


def split_frames(data: memoryview) -> Iterator[tuple[int, int]]:
    """Where each whole frame in data begins, without its length, and ends.

    Raises ConnectionError for a length that no frame has.
    """
    start = 4
    while start <= len(data):
        end = start + int.from_bytes(data[start - 4 : start], "big")
        if end - start > _LARGEST_FRAME:
            raise ConnectionError("no frame is that long")
        if end > len(data):
            return
        yield start, end
        start = end + 4


class Presence:
    """Whether the guest's system has an address: it was given one, or was seen to use one."""

    def __init__(self) -> None:
        self.is_up = False

    def notice_guest(self, frame: bytes | memoryview) -> None:
        """Learn from a frame of the guest; who asks for an address has 0.0.0.0 as its own."""
        kind = frame[12:14]
        if kind == _IPV4:
            self.is_up = frame[26:30] != _NOBODY
        elif kind == _ARP and frame[28:32] != _NOBODY:
            self.is_up = True

    def notice_passt(self, frame: bytes | memoryview) -> None:
        """Learn from a frame for the guest: the DHCP server's (RFC 2131) gives it an address."""
        if len(frame) > 42 and frame[12:14] == _IPV4 and frame[23] == _UDP:
            self.is_up = self.is_up or frame[34:36] == _DHCP_SERVER


class Refusals:
    """The guest's refusals that passt is to hear of later, oldest first."""

    def __init__(self) -> None:
        self._held: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

    def hold(self, frame: bytes | memoryview) -> None:
        """Take a refusal; bytes, since the place of a received frame is used again."""
        held = struct.pack("!I", len(frame)) + bytes(frame)
        self._held.put((time.monotonic() + _REFUSAL_S, held))

    def release(self, passt: Link) -> None:
        """Send each when its time has come, until passt has ended."""
        while True:
            due, held = self._held.get()
            time.sleep(max(0.0, due - time.monotonic()))
            passt.send(held)


def relay_guest(guest: Link, passt: Link, presence: Presence, refusals: Refusals) -> None:
    """Pass on what the guest sends, until a socket ends or the framing is broken.

    A read usually holds many frames; they go out in as few writes as possible.
    """
    while frames := guest.receive():
        unsent = 0
        for start, end in split_frames(frames):
            frame = frames[start:end]
            presence.notice_guest(frame)
            if not is_allowed(frame):
                passt.send(frames[unsent : start - 4])
                unsent = end
            elif is_refusal(frame):
                passt.send(frames[unsent : start - 4])
                unsent = end
                refusals.hold(frame)
            elif tcp_flags(frame) & _SYN:
                passt.send(frames[unsent:end])
                unsent = end
                _wait_read(passt, guest)
                ack = make_missing_ack(frame)
                if ack is not None:
                    guest.send(struct.pack("!I", len(ack)) + ack)
        passt.send(frames[unsent:])


def _wait_read(passt: Link, guest: Link) -> None:
    # Usually a few microseconds. There is nothing to wait on: the kernel tells a writer of free
    # space, but not of an empty queue. A guest that has ended must not be kept by a stuck passt.
    while passt.count_unread() and not guest.has_ended():
        time.sleep(_READ_STEP_S)


def relay_passt(passt: Link, guest: Link, presence: Presence) -> None:
    """Pass on what is meant for the guest; refuse connections for it while it is not there."""
    while frames := passt.receive():
        if presence.is_up:
            guest.send(frames)
            continue
        for start, end in split_frames(frames):
            frame = frames[start:end]
            presence.notice_passt(frame)
            refusal = make_refusal(frame)
            if refusal is None:
                guest.send(frames[start - 4 : end])
            else:
                passt.send(struct.pack("!I", len(refusal)) + refusal)


def main(guest_fd: int, passt_fd: int) -> None:
    """Relay both ways until either socket ends."""
    guest = Link(socket.socket(fileno=guest_fd))
    passt = Link(socket.socket(fileno=passt_fd))
    presence = Presence()
    refusals = Refusals()
    # A thread for each way: one loop that waits to write would keep passt waiting for it to read.
    for beside in (
        partial(relay_passt, passt, guest, presence),
        partial(refusals.release, passt),
    ):
        threading.Thread(target=_run, args=(beside,), daemon=True).start()
    _run(partial(relay_guest, guest, passt, presence, refusals))


def _run(relay: Callable[[], None]) -> None:
    try:
        relay()
    except OSError:
        pass  # the other end closed while we wrote, which ends us like its closing does
    finally:
        # Not sys.exit: the other threads wait for something, and their end is of no use to anybody.
        os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
