"""The network of a VM without privileges: passt, reached through the VM's loopback address.

The guest is 10.0.2.15 behind the gateway 10.0.2.2, as with QEMU's own user network, whatever
the host's addresses are; so a guest that was suspended finds its network again anywhere.

What a guest can reach: whatever the host can route to, over IPv4, which includes servers of the
host that listen on its outside addresses or on 0.0.0.0. What it cannot: the host's loopback
(127.0.0.0/8, ::1) and with it lumed's API and the other VMs' addresses. The flags that see to
this and the versions of passt they were tried with are explained at `_list_flags`.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lumed.errors import MachineFailed, MissingDependency
from lumed.model.run import NetDevice
from lumed.model.vm import PortForward
from lumed.network import host, passt_guard
from lumed.network.addresses import Place, choose_place
from lumed.osproc import Child, get_program, start_detached

_GUEST, _GATEWAY, _RESOLVER = "10.0.2.15", "10.0.2.2", "10.0.2.3"
_GATEWAY_MAC = "9a:55:9a:55:9a:55"  # passt's own choice in its newer versions
_START_TIMEOUT_S = 5.0
_TRIES = 4
_BIND_WORDS = ("bind", "listen on", "listen failed", "already in use")


@asynccontextmanager
async def start_user_network(
    *, uuid: str, ports: Iterable[PortForward], log: Path, taken: Collection[str] = ()
) -> AsyncIterator[NetDevice]:
    """Start passt for one machine and yield what its QEMU needs.

    Start QEMU inside the block: on leaving it our copy of the descriptor is closed, and from
    then on passt lives exactly as long as QEMU does. If no QEMU was started, or if this process
    is killed before, passt ends at once. `taken` are the loopback addresses of other VMs;
    passt's messages are appended to `log`.

    Where passt is missing, the guest gets QEMU's user network with everything but the forwards
    cut off, since that one cannot be kept away from the host's loopback otherwise; `problem`
    says so. Raises MachineFailed with passt's last words if it does not start.
    """
    ports = tuple(ports)
    try:
        passt = await asyncio.to_thread(_find_passt)
    except MissingDependency as error:
        yield await asyncio.to_thread(_plan_restricted, uuid, ports, taken, error)
        return
    qemu_end, plan = await _start_on_free_address(passt, uuid, ports, log, taken)
    try:
        if passt.needs_guard:
            qemu_end = await _insert_guard(qemu_end, log)
        yield NetDevice(
            netdev=f"stream,server=off,addr.type=fd,addr.str={qemu_end.fileno()}",
            pass_fds=(qemu_end.fileno(),),
            address=plan.place.address,
            forwards=plan.place.forwards,
            problem=plan.problem,
        )
    finally:
        qemu_end.close()


@dataclass(frozen=True, slots=True)
class _Passt:
    path: Path
    needs_guard: bool


def _find_passt() -> _Passt:
    path = get_program("passt", package="passt")
    status = path.stat()
    return _inspect_passt(path, status.st_mtime_ns, status.st_size)


@cache
def _inspect_passt(path: Path, mtime_ns: int, size: int) -> _Passt:
    # The option came in August 2024, after what the guard makes up for. Its usage text is looked
    # for in the file, because Debian 12's passt calls --help an error and complains to syslog.
    return _Passt(path, needs_guard=b"--map-host-loopback" not in path.read_bytes())


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where the VM is reached, and what passt shall know of the host."""

    place: Place
    nameservers: tuple[str, ...]
    problem: str | None


def _plan(
    passt: _Passt,
    uuid: str,
    ports: tuple[PortForward, ...],
    lowest_port: int,
    taken: Collection[str],
) -> _Plan:
    place = choose_place(uuid, ports, lowest_port, taken)
    nameservers = host.read_nameservers()
    problems = _list_held_ports(place)
    if host.find_default_interface() is None:
        problems.append("This host has no default route, so the guest cannot reach the outside.")
    elif not nameservers and passt.needs_guard:
        problems.append(
            "This host's name servers are on its loopback, so the guest was told of none; "
            f"set {_RESOLVER} in the guest, which leads to the host's."
        )
    return _Plan(place, nameservers, " ".join(problems) or None)


def _list_held_ports(place: Place) -> list[str]:
    ports = ", ".join(str(port) for _, port in sorted(place.held))
    if not ports:
        return []
    return [
        f"Another program of this host listens on all its addresses at port {ports}, so there "
        f"{place.address} leads to the host; the guest is reached at the moved ports."
    ]


def _list_flags(passt: _Passt, plan: _Plan) -> list[str]:
    """passt's arguments, without its socket.

    Tried with 2023-03 (Debian 12), 2025-05 (Debian 13) and 2026-10, by frames made by hand:
    --no-map-gw: else the gateway's address leads to the host's loopback. --ipv4-only: IPv6 has
    ::1 and ::ffff:127.0.0.1 as well, which the first one connects to and which crash the last.
    --interface lo: only a template for addresses, all given here; so it also starts on a host
    without a route, and a route that comes later is used. One --tcp-ports for each port: of a
    list, 2023-03 silently leaves out those that it cannot bind.
    """
    flags = ["--foreground", "--quiet", "--ipv4-only", "--no-map-gw", "--interface", "lo"]
    flags += ["--address", _GUEST, "--netmask", "24", "--gateway", _GATEWAY]
    flags += ["--mac-addr", _GATEWAY_MAC]
    if not passt.needs_guard:
        flags += ["--map-host-loopback", "none", "--map-guest-addr", "none"]
    for server in plan.nameservers:
        flags += ["--dns", server]
    if not plan.nameservers:
        # UDP to port 53 of this address, and nothing else, goes to the host's own resolver.
        flags += ["--dns-forward", _RESOLVER]
    for forward in plan.place.forwards:
        option = "--udp-ports" if forward.protocol == "udp" else "--tcp-ports"
        flags += [option, f"{forward.address}/{forward.port}:{forward.guest_port}"]
    return flags


async def _start_on_free_address(
    passt: _Passt, uuid: str, ports: tuple[PortForward, ...], log: Path, taken: Collection[str]
) -> tuple[socket.socket, _Plan]:
    """Start passt; go to the next address while another process is faster at binding a port."""
    lowest_port = await asyncio.to_thread(host.read_lowest_port)
    tried = set(taken)
    for tries_left in reversed(range(_TRIES)):
        plan = await asyncio.to_thread(_plan, passt, uuid, ports, lowest_port, tried)
        try:
            return await _start_passt(passt, plan, log), plan
        except _CannotBind as error:
            if not tries_left:
                raise MachineFailed(error.message) from error
            if "Permission denied" in error.message and lowest_port == 0:
                # passt of 2026 has given up root's privileges by the time it binds.
                lowest_port = await asyncio.to_thread(host.read_unprivileged_port_start)
            else:
                tried.add(plan.place.address)
    raise AssertionError("unreachable")


class _CannotBind(MachineFailed):
    """passt ended because a port was taken."""


async def _start_passt(passt: _Passt, plan: _Plan, log: Path) -> socket.socket:
    """Start passt and return the connected socket once it forwards; it ends with that socket."""
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            log_start = await asyncio.to_thread(_measure, log)
            flags = [*_list_flags(passt, plan), "--fd", str(theirs.fileno())]
            child = await start_detached([passt.path, *flags], log=log, pass_fds=(theirs.fileno(),))
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                if await _greet(ours):
                    return ours
        except TimeoutError as error:
            raise MachineFailed(
                f"passt did not answer within {_START_TIMEOUT_S:g} s", hint=f"see {log}"
            ) from error
        raise await _explain_end(child, log, log_start)
    except BaseException:
        ours.close()
        raise


async def _greet(passt: socket.socket) -> bool:
    """Ask passt for the gateway's MAC, as a guest would; False if it ended instead.

    It answers once all its ports are bound. The question is an ARP probe (RFC 5227), whose
    unset sender address teaches passt nothing.
    """
    loop = asyncio.get_running_loop()
    passt.setblocking(False)
    mac = bytes.fromhex("525400000001")
    ethernet = b"\xff" * 6 + mac + b"\x08\x06"
    arp = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1)
    arp += mac + bytes(4) + bytes(6) + socket.inet_aton(_GATEWAY)
    try:
        await loop.sock_sendall(passt, struct.pack("!I", len(ethernet + arp)) + ethernet + arp)
        while frame := await _receive_frame(passt):
            if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\x00\x02":
                passt.setblocking(True)
                return True
    except ConnectionError:
        pass
    return False


async def _receive_frame(passt: socket.socket) -> bytes:
    """One whole frame and not a byte more, since QEMU reads on from there; empty at the end."""
    size = await _receive_exactly(passt, 4)
    return await _receive_exactly(passt, int.from_bytes(size, "big")) if size else b""


async def _receive_exactly(passt: socket.socket, count: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < count:
        more = await loop.sock_recv(passt, count - len(data))
        if not more:
            return b""
        data += more
    return data


def _measure(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


async def _explain_end(child: Child, log: Path, log_start: int) -> MachineFailed:
    async with asyncio.timeout(_START_TIMEOUT_S):
        status = await child.exit_status
    words = await asyncio.to_thread(_read_last_words, log, log_start)
    message = f"passt ended with status {status}: {words or 'no message'}"
    if any(word in words.lower() for word in _BIND_WORDS):
        return _CannotBind(message)
    return MachineFailed(message, hint=f"see {log}")


def _read_last_words(log: Path, log_start: int) -> str:
    with log.open("rb") as file:
        file.seek(log_start)
        lines = file.read().decode(errors="replace").splitlines()
    return "; ".join(line for line in lines if line and not _is_noise(line))


def _is_noise(line: str) -> bool:
    return "syslog" in line or " root" in line


async def _insert_guard(passt_end: socket.socket, log: Path) -> socket.socket:
    """Start the guard on passt's socket and return the guest's side of it."""
    ours, theirs = socket.socketpair()
    try:
        with theirs, passt_end:
            fds = (theirs.fileno(), passt_end.fileno())
            program = [sys.executable, "-I", "-S", passt_guard.__file__]
            await start_detached([*program, *map(str, fds)], log=log, pass_fds=fds)
    except BaseException:
        ours.close()
        raise
    return ours


def _plan_restricted(
    uuid: str, ports: tuple[PortForward, ...], taken: Collection[str], error: MissingDependency
) -> NetDevice:
    place = choose_place(uuid, ports, host.read_lowest_port(), taken)
    rules = ",".join(
        f"hostfwd={f.protocol}:{f.address}:{f.port}-{_GUEST}:{f.guest_port}" for f in place.forwards
    )
    cut_off = f"{error.message}, so the guest cannot reach the outside: {error.hint}"
    return NetDevice(
        netdev=f"user,ipv6=off,restrict=on,{rules}",
        address=place.address,
        forwards=place.forwards,
        problem=" ".join([*_list_held_ports(place), cut_off]),
    )
