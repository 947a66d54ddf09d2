"""One door for both kinds of network: what a VM's network word becomes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

from lumed.log import EventLog
from lumed.model.run import NetDevice
from lumed.model.vm import PortForward
from lumed.network.bridge import check_bridge, start_bridge, sweep_macvtaps
from lumed.network.plan import Network, NetworkKind
from lumed.network.user import start_user_network

_log = EventLog("network")


async def check_network(network: Network) -> None:
    """Raise what start_network would raise for a reason that is known before.

    InvalidField for an unknown interface, NotPossibleHere without the rights.
    """
    if network.kind is NetworkKind.BRIDGED:
        check_bridge(network.interface)


async def sweep_networks() -> None:
    """Remove what ended machines left of their networks: macvtaps do not go by themselves."""
    for name in await sweep_macvtaps():
        _log.info("macvtap removed", name=name)


@asynccontextmanager
async def start_network(
    network: Network,
    *,
    uuid: str,
    mac: str,
    ports: Iterable[PortForward],
    taken: Collection[str],
    log: Path,
) -> AsyncIterator[NetDevice | None]:
    """Yield what QEMU needs for its card, None for a machine without one.

    QEMU must be started inside the block; afterwards the network lives as long as QEMU does.
    """
    match network.kind:
        case NetworkKind.NONE:
            yield None
        case NetworkKind.NAT:
            async with start_user_network(uuid=uuid, ports=ports, log=log, taken=taken) as device:
                yield device
        case NetworkKind.BRIDGED:
            async with start_bridge(network.interface, mac, uuid) as device:
                yield device
