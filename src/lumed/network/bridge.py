"""The network of a VM that shall be a neighbour of its host: a port of a bridge, or a macvtap.

Both need root (CAP_NET_ADMIN). A tap in a bridge belongs to its descriptor and is gone with
QEMU, however that ends. A macvtap, for a plain network card, stays: `sweep_macvtaps` removes
those whose QEMU has ended. Over a macvtap the guest and its own host cannot talk to each other;
that is how the kernel's macvlan works.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

from lumed.claim import find_holder
from lumed.errors import InvalidField, NotPossibleHere, ToolFailed
from lumed.model.run import NetDevice
from lumed.network.host import find_default_interface
from lumed.osproc import get_program, run_tool, run_tool_blocking

# linux/if_tun.h, linux/sockios.h, linux/if.h
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_SIOCSIFFLAGS, _SIOCSIFHWADDR, _SIOCBRADDIF = 0x8914, 0x8924, 0x89A2
_IFF_UP = 0x1
_ARPHRD_ETHER = 1

_SYS = Path("/sys/class/net")
_MACVTAP_PREFIX = "lumevtap"
_IP_TIMEOUT_S = 10.0
_IP_PLACES = ("/usr/sbin/ip", "/sbin/ip")


@contextlib.asynccontextmanager
async def start_bridge(interface: str | None, mac: str, uuid: str) -> AsyncIterator[NetDevice]:
    """Connect a new network card to `interface` and yield what its QEMU needs.

    None takes the interface of the default route. Start QEMU inside the block: on leaving it
    our copy of the descriptor is closed. mac is the guest's. Raises InvalidField for an unknown
    interface, NotPossibleHere where the host or our rights do not allow it.
    """
    name = await asyncio.to_thread(_choose_interface, interface)
    _require_root(name)
    if (_SYS / name / "bridge").is_dir():
        fd = await asyncio.to_thread(_open_tap, name, mac)
    else:
        fd = await _open_macvtap(name, mac, uuid)
    try:
        yield NetDevice(netdev=f"tap,fd={fd}", pass_fds=(fd,))
    finally:
        os.close(fd)


def check_bridge(interface: str | None) -> None:
    """Raise what start_bridge would raise for an unknown interface or missing rights."""
    _require_root(_choose_interface(interface))


def list_interfaces() -> list[str]:
    """The interfaces that a VM can be bridged to, by name; the loopback one is none."""
    names = (name for _, name in socket.if_nameindex())
    return sorted(
        name
        for name in names
        if (_SYS / name / "bridge").is_dir() or _explain_refusal(name) is None
    )


def _choose_interface(interface: str | None) -> str:
    present = [name for _, name in socket.if_nameindex()]
    if interface is None:
        found = find_default_interface()
        if found is None:
            raise NotPossibleHere(
                "bridged needs an interface, and this host has no default route to take it from",
                hint="name one: bridged:<interface>, of " + ", ".join(present),
            )
        return found
    if interface not in present:
        reason = f"no interface {interface!r} on this host, which has " + ", ".join(present)
        raise InvalidField(f"network: {reason}", fields={"network": reason})
    return interface


def _require_root(interface: str) -> None:
    if os.geteuid() != 0:
        raise NotPossibleHere(
            f"bridged networking on {interface} needs root, and lumed runs as user {os.geteuid()}",
            hint='run the server as root, or use network "nat"',
        )


def _open_tap(bridge: str, mac: str) -> int:
    """A tap without a name of ours (the kernel numbers it) that is up and a port of `bridge`."""
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise NotPossibleHere(
            f"bridged networking needs /dev/net/tun: {error.strerror}", hint="sudo modprobe tun"
        ) from error
    try:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
        answer = fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", b"lumetap%d", flags))
        name = answer[:16].rstrip(b"\0")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            # A bridge without an address of its own takes its lowest port's; with fe as the
            # first byte it is never the guest's, so the host's address stays as it is.
            address = b"\xfe" + bytes.fromhex(mac.replace(":", ""))[1:]
            fcntl.ioctl(
                control,
                _SIOCSIFHWADDR,
                struct.pack("16sH6s16x", name, _ARPHRD_ETHER, address),
            )
            index = socket.if_nametoindex(name.decode())
            fcntl.ioctl(control, _SIOCBRADDIF, struct.pack("16si20x", bridge.encode(), index))
            fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", name, _IFF_UP))
    except OSError as error:
        os.close(fd)
        raise NotPossibleHere(
            f"The kernel refused a tap as a port of {bridge}: {error.strerror}",
            hint='this needs CAP_NET_ADMIN; or use network "nat"',
        ) from error
    return fd


async def _open_macvtap(parent: str, mac: str, uuid: str) -> int:
    """A macvtap on a plain network card; its name holds the uuid's beginning."""
    _require_macvtap_parent(parent)
    ip = get_program("ip", package="iproute2", also=_IP_PLACES)
    name = _MACVTAP_PREFIX + uuid.replace("-", "")[: 15 - len(_MACVTAP_PREFIX)]
    await asyncio.to_thread(_remove_if_unused, ip, name)
    kind = ["type", "macvtap", "mode", "bridge"]
    try:
        await run_tool(
            [ip, "link", "add", "link", parent, "name", name, "address", mac, *kind],
            timeout_s=_IP_TIMEOUT_S,
        )
    except ToolFailed as error:
        raise NotPossibleHere(
            f"The kernel refused a macvtap on {parent}: {error}",
            hint=f'make a bridge with {parent} in it and name that one, or use network "nat"',
        ) from error
    try:
        fd = os.open(_device_of(name), os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        await _delete_link(ip, name)
        raise NotPossibleHere(
            f"The macvtap on {parent} has no usable device file: {error}",
            hint=f'make a bridge with {parent} in it and name that one, or use network "nat"',
        ) from error
    try:
        await run_tool([ip, "link", "set", name, "up"], timeout_s=_IP_TIMEOUT_S)
    except BaseException:
        os.close(fd)
        await _delete_link(ip, name)
        raise
    return fd


def _require_macvtap_parent(parent: str) -> None:
    why = _explain_refusal(parent)
    if why is not None:
        raise NotPossibleHere(
            f"bridged networking on {parent} is not possible: it {why}",
            hint='name a bridge or an Ethernet card, or use network "nat"',
        )


def _explain_refusal(parent: str) -> str | None:
    if (_SYS / parent / "wireless").exists():
        return "is wireless, and an access point takes no other MAC addresses than its own"
    if (_SYS / parent / "type").read_text().strip() != str(_ARPHRD_ETHER) or parent == "lo":
        return "is neither a bridge nor an Ethernet card"
    return None


def _device_of(macvtap: str) -> Path:
    return Path(f"/dev/tap{socket.if_nametoindex(macvtap)}")


async def _delete_link(ip: Path, name: str) -> None:
    await asyncio.shield(run_tool([ip, "link", "delete", name], timeout_s=_IP_TIMEOUT_S))


async def sweep_macvtaps() -> tuple[str, ...]:
    """Remove the macvtaps of machines that have ended, and return their names.

    One whose device file any process has open stays, whichever server it belongs to. Call it
    at the server's start and after the end of a bridged machine; without root it does nothing.
    """
    if os.geteuid() != 0:
        return ()
    ours = [name for _, name in socket.if_nameindex() if name.startswith(_MACVTAP_PREFIX)]
    if not ours:
        return ()
    ip = get_program("ip", package="iproute2", also=_IP_PLACES)
    return tuple([name for name in ours if await asyncio.to_thread(_remove_if_unused, ip, name)])


def _remove_if_unused(ip: Path, name: str) -> bool:
    try:
        if _is_open(_device_of(name)):
            return False
        run_tool_blocking([ip, "link", "delete", name], timeout_s=_IP_TIMEOUT_S)
    except (OSError, ToolFailed):
        return False  # it is gone already, or was taken meanwhile
    return True


def _is_open(device: Path) -> bool:
    # find_holder leaves this process out, which has it open while a machine is being started.
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if link.samefile(device):
                return True
    return find_holder(device) is not None
