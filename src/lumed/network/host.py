"""What this host gives to its guests: low ports, a way out, name servers."""

from __future__ import annotations

import ipaddress
from pathlib import Path

_CAP_NET_BIND_SERVICE = 10
_RESOLV_CONF = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))


def read_lowest_port() -> int:
    """The lowest port that this process may bind: 0 with CAP_NET_BIND_SERVICE, as root has it."""
    status = Path("/proc/self/status").read_text()
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff"))
    if int(effective, 16) >> _CAP_NET_BIND_SERVICE & 1:
        return 0
    return read_unprivileged_port_start()


def read_unprivileged_port_start() -> int:
    """The lowest port that a process without privileges may bind (ip-sysctl, 1024 by default)."""
    return int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())


def find_default_interface() -> str | None:
    """The interface of the IPv4 default route with the lowest metric."""
    return parse_default_interface(Path("/proc/net/route").read_text())


def parse_default_interface(table: str) -> str | None:
    """`find_default_interface` on the text of /proc/net/route (proc(5))."""
    routes = [line.split() for line in table.splitlines()[1:]]
    defaults = [route for route in routes if route[1] == route[7] == "00000000"]
    return min(defaults, key=lambda route: int(route[6]))[0] if defaults else None


def read_nameservers() -> tuple[str, ...]:
    """The IPv4 name servers that a guest can reach; empty if the host has loopback ones only.

    systemd-resolved writes its loopback address to /etc/resolv.conf and the servers behind it
    to a file of its own (systemd-resolved.service(8)), so that one is asked next.
    """
    for path in _RESOLV_CONF:
        try:
            servers = parse_nameservers(path.read_text(errors="replace"))
        except OSError:
            continue
        if servers:
            return servers
    return ()


def parse_nameservers(text: str) -> tuple[str, ...]:
    """The IPv4 servers of a resolv.conf(5) that are no loopback ones, at most three."""
    servers = []
    for line in text.splitlines():
        match line.split():
            case ["nameserver", server, *_] if _is_outside(server):
                servers.append(server)
    return tuple(servers[:3])


def _is_outside(server: str) -> bool:
    try:
        address = ipaddress.IPv4Address(server)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified)
