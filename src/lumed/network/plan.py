"""What a VM's network word means, and which host ports shall lead to its guest. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from lumed.errors import InvalidField
from lumed.model.run import Forward
from lumed.model.vm import PortForward

COMMON_PORTS = (22, 80, 443, 3000, 3389, 5000, 5900, 5901, 6080, 8000, 8006, 8080, 8443, 8888)
"""TCP ports that guests commonly serve (SSH, web and its development servers, RDP, VNC and its
web view); each costs one listening socket a VM."""

MOVED_BY = 10_000

# What Linux accepts as an interface name (dev_valid_name), less the colon of old-style aliases.
_INTERFACE = re.compile(r"[^\s/:]{1,15}")


class NetworkKind(StrEnum):
    """The first word of a network setting."""

    NONE = "none"
    NAT = "nat"
    BRIDGED = "bridged"


@dataclass(frozen=True, slots=True)
class Network:
    """A parsed network word; interface only with BRIDGED, None there: the default route's."""

    kind: NetworkKind
    interface: str | None = None

    def __str__(self) -> str:
        return self.kind if self.interface is None else f"{self.kind}:{self.interface}"


def parse_network(word: str) -> Network:
    """Parse "none", "nat", "bridged" or "bridged:<interface>"; InvalidField for anything else."""
    kind, colon, interface = word.partition(":")
    if kind == NetworkKind.BRIDGED and colon:
        if _INTERFACE.fullmatch(interface) and interface not in (".", ".."):
            return Network(NetworkKind.BRIDGED, interface)
    elif not colon and kind in list(NetworkKind):
        return Network(NetworkKind(kind))
    reason = 'must be "nat", "bridged", "bridged:<interface>" or "none"'
    raise InvalidField(f"network {reason}, not {word!r}", fields={"network": reason})


Port = tuple[str, int]
"""A protocol, "tcp" or "udp", and a port number."""


def plan_forwards(
    address: str,
    user_ports: Iterable[PortForward],
    lowest_port: int,
    held: Collection[Port] = (),
) -> tuple[Forward, ...]:
    """The forwards at `address`: the VM's own ports first, then the common ones.

    A host port that is below lowest_port, in `held`, or wanted twice is replaced by the first
    usable one from MOVED_BY above it.
    """
    forwards: dict[Port, Forward] = {}
    common = (PortForward(port) for port in COMMON_PORTS)
    for asked in (*user_ports, *common):
        wanted = asked.host_port or asked.guest_port
        same = forwards.get((asked.protocol, wanted))
        if same is not None and same.guest_port == asked.guest_port:
            continue
        port = next(
            port
            for port in _list_host_ports(wanted)
            if port >= lowest_port
            and (asked.protocol, port) not in held
            and (asked.protocol, port) not in forwards
        )
        forwards[asked.protocol, port] = Forward(asked.guest_port, address, port, asked.protocol)
    return tuple(forwards.values())


def _list_host_ports(wanted: int) -> Iterator[int]:
    yield wanted
    yield from range(wanted + MOVED_BY, 65536)
    yield from range(2 * MOVED_BY, 65536)
