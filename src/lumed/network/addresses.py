"""A loopback address for each VM, so that clients reach its guest by the guest's own ports.

Linux answers on all of 127.0.0.0/8; 127.77.0.0/16 is lumed's part of it. A VM's address comes
from its uuid, so it is the same in every run unless somebody else is on it.
"""

from __future__ import annotations

import errno
import hashlib
import ipaddress
import socket
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from lumed.errors import MachineFailed
from lumed.model.run import Forward
from lumed.model.vm import PortForward
from lumed.network.plan import Port, plan_forwards

_FIRST = int(ipaddress.IPv4Address("127.77.0.1"))
_COUNT = 65534
# The last address of the range is never given to a VM: a port that cannot be bound there is
# held on every address (a server on 0.0.0.0, as sshd usually is) or forbidden to us.
_SPARE = "127.77.255.255"
_TRIES = 256


def list_addresses(uuid: str) -> Iterator[str]:
    """Every address of the range, beginning with the VM's own."""
    start = int.from_bytes(hashlib.sha256(uuid.encode()).digest()[:8], "big")
    for step in range(_COUNT):
        yield str(ipaddress.IPv4Address(_FIRST + (start + step) % _COUNT))


@dataclass(frozen=True, slots=True)
class Place:
    """A VM's address and its forwards; `held` are the ports that no VM can have here."""

    address: str
    forwards: tuple[Forward, ...]
    held: frozenset[Port]


def choose_place(
    uuid: str, user_ports: Iterable[PortForward], lowest_port: int, taken: Collection[str]
) -> Place:
    """The VM's address and its forwards, all of which could be bound just now.

    Addresses in `taken` are passed over, and those where another process holds a port.
    Raises MachineFailed if none of the first 256 is usable. Blocks for well below 1 ms.
    """
    ports = tuple(user_ports)
    held = _find_held_everywhere(ports, lowest_port)
    free = (address for address in list_addresses(uuid) if address not in taken)
    for address in islice(free, _TRIES):
        forwards = plan_forwards(address, ports, lowest_port, held)
        if all(can_bind(address, forward.protocol, forward.port) for forward in forwards):
            return Place(address, forwards, held)
    raise MachineFailed(
        f"No loopback address is free for the VM's ports: tried {_TRIES} in 127.77.0.0/16",
        hint="see who listens there: ss -lntu",
    )


def _find_held_everywhere(ports: tuple[PortForward, ...], lowest_port: int) -> frozenset[Port]:
    held: frozenset[Port] = frozenset()
    while True:
        forwards = plan_forwards(_SPARE, ports, lowest_port, held)
        more = {(f.protocol, f.port) for f in forwards if not can_bind(_SPARE, f.protocol, f.port)}
        if not more:
            return held
        held |= more


def can_bind(address: str, protocol: str, port: int) -> bool:
    """Whether this process could listen there now."""
    kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
    with socket.socket(socket.AF_INET, kind) as probe:
        if kind == socket.SOCK_STREAM:
            # As passt does: closed connections of an earlier run must not hold the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True
