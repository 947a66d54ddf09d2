"""What the network tests put around a guest: an outside, servers that count, raw frames."""

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address

ANSWER = b"HTTP/1.0 200 OK\r\nContent-Length: 8\r\n\r\nreached\n"
SERVE = f"""
import socket
server = socket.create_server(("", 80))
print("ready", flush=True)
while True:
    client, _ = server.accept()
    client.recv(4096)
    client.sendall({ANSWER!r})
    client.close()
"""


def run_ip(*argv: str) -> None:
    subprocess.run(["ip", *argv], check=True, capture_output=True, timeout=20)


@dataclass(frozen=True)
class Outside:
    """Another machine: a network namespace behind a veth pair, with a web server on port 80.

    host_address is this host's end, on `interface`; the other end is `far`, in `namespace`.
    """

    namespace: str
    far: str
    interface: str
    host_address: str
    address: str


@contextlib.contextmanager
def outside(number: int, *, bridged: bool = False) -> Iterator[Outside]:
    """Make an outside; with `bridged`, this host's end is a port of a new bridge.

    All names hold the session's mark: another session's reaper must not remove them.
    """
    mark = os.environ["LUMED_TEST_SESSION"][:6]
    name, near, far = (f"lm{kind}{mark}x{number}" for kind in "onf")
    host_address, address = f"10.213.{number}.1", f"10.213.{number}.2"
    with contextlib.ExitStack() as undo:
        run_ip("netns", "add", name)
        undo.callback(run_ip, "netns", "del", name)
        run_ip("link", "add", "name", near, "type", "veth", "peer", "name", far, "netns", name)
        # Deleting a namespace takes its veth along, but only some time after the command.
        undo.callback(run_ip, "link", "del", near)
        interface = near
        if bridged:
            bridge = f"lmh{mark}x{number}"
            run_ip("link", "add", "name", bridge, "type", "bridge")
            undo.callback(run_ip, "link", "del", bridge)
            run_ip("link", "set", near, "master", bridge)
            run_ip("link", "set", bridge, "up")
            interface = bridge
        run_ip("address", "add", f"{host_address}/24", "dev", interface)
        run_ip("link", "set", near, "up")
        for command in (f"address add {address}/24 dev {far}", f"link set {far} up"):
            run_ip("-n", name, *command.split())
        server = subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-c", SERVE], stdout=subprocess.PIPE
        )
        undo.callback(server.wait)
        undo.callback(server.kill)
        assert server.stdout is not None
        undo.callback(server.stdout.close)
        assert server.stdout.readline() == b"ready\n"
        yield Outside(name, far, interface, host_address, address)


@dataclass
class CountingServer:
    """A web server of this host that remembers who came."""

    sockets: list[socket.socket]
    visits: list[str] = field(default_factory=list)

    def port(self, index: int = 0) -> int:
        return int(self.sockets[index].getsockname()[1])

    def serve(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = server.accept()
                with client:
                    self.visits.append(str(server.getsockname()[0]))
                    client.sendall(ANSWER)


@contextlib.contextmanager
def serve_on(addresses: Sequence[str], port: int = 0) -> Iterator[CountingServer]:
    """Serve at all addresses on one port; IPv6 ones take IPv6 only."""
    counting = CountingServer([])
    with contextlib.ExitStack() as undo:
        threads = []
        for address in addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            server = socket.create_server((address, port), family=family)
            undo.callback(server.close)
            port = server.getsockname()[1]
            counting.sockets.append(server)
            threads.append(threading.Thread(target=counting.serve, args=(server,)))
            threads[-1].start()
        try:
            yield counting
        finally:
            for server in counting.sockets:
                # Closing alone does not wake a thread that sits in accept.
                server.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(10)


MAC = bytes.fromhex("525400123456")


def frame_bytes(kind: bytes, packet: bytes, to: bytes) -> bytes:
    """A frame from this guest's card, with its length before it."""
    frame = to + MAC + kind + packet
    return struct.pack("!I", len(frame)) + frame


def send_frame(link: socket.socket, kind: bytes, packet: bytes, to: bytes) -> None:
    link.sendall(frame_bytes(kind, packet, to))


def ask_mac(link: socket.socket, gateway: str, own: str) -> bytes:
    """The gateway's MAC by ARP; passt has then handled every frame that was sent before."""
    arp = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + MAC + IPv4Address(own).packed
    send_frame(link, b"\x08\x06", arp + bytes(6) + IPv4Address(gateway).packed, b"\xff" * 6)
    link.settimeout(10)
    while True:
        size = receive(link, 4)
        frame = receive(link, int.from_bytes(size, "big"))
        if frame[12:14] == b"\x08\x06":
            return frame[22:28]


def receive(link: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = link.recv(count - len(data))
        assert more, "the network ended"
        data += more
    return data


def make_syn(source: str, target: str, port: int) -> tuple[bytes, bytes]:
    """The Ethernet type and the packet of a TCP connection's first segment."""
    tcp = struct.pack("!HHIIBBHHH", 40_000 + port % 20_000, port, 1, 0, 5 << 4, 2, 65535, 0, 0)
    if ":" in target:
        ends = IPv6Address(source).packed + IPv6Address(target).packed
        header = struct.pack("!IHBB", 6 << 28, len(tcp), 6, 64) + ends
        kind = b"\x86\xdd"
    else:
        ends = IPv4Address(source).packed + IPv4Address(target).packed
        header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 1, 0, 64, 6, 0) + ends
        header = header[:10] + add_up(header) + header[12:]
        kind = b"\x08\x00"
    sum_ = add_up(ends + struct.pack("!II", len(tcp), 6) + tcp)
    return kind, header + tcp[:16] + sum_ + tcp[18:]


def add_up(data: bytes) -> bytes:
    """The internet checksum (RFC 1071) of an even number of bytes."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)
