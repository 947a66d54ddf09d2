"""When a guest can be reached: evidence that came from inside it.

A forwarded port accepts on the host even if nothing listens in the guest, so a connection
proves nothing. These do: the guest agent names an address of the VM's card, sshd sent its
banner, or the service on port 8000 sent a byte.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum

from lumed.errors import LumedError, TimedOut
from lumed.guest.agent import GuestAgent

_SHORTEST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 1.0
# One question. A software-emulated guest that has just booted takes over a second to answer.
_ATTEMPT_S = 3.0
# How long to trust that the agent's port would have been announced: a server that was restarted
# may have missed the event.
_AGENT_EVENT_S = 10.0


class Evidence(StrEnum):
    """What showed that the guest is reachable."""

    AGENT = "agent"
    SSH = "ssh"
    ANSWER = "answer"


@dataclass(frozen=True, slots=True)
class Ready:
    """The guest is reachable; address is the IPv4 address it says it has, if the agent spoke."""

    evidence: Evidence
    address: str | None = None


async def wait_ready(
    *,
    mac: str,
    agent: GuestAgent | None = None,
    agent_open: asyncio.Event | None = None,
    ssh: tuple[str, int] | None = None,
    answer: tuple[str, int] | None = None,
    timeout_s: float | None = None,
) -> Ready:
    """Wait for the first evidence that the guest can be reached.

    mac is that of the VM's card. ssh and answer are the host address and port that lead to the
    guest's ports 22 and 8000. agent_open is set while the guest's end of the agent's port is
    open (QMP event VSERPORT_CHANGE), so that a guest without an agent is not asked for it.
    Raises TimedOut after timeout_s; None waits until cancelled.
    """
    watchers: list[Awaitable[Ready]] = []
    if agent is not None:
        watchers.append(_watch_agent(agent, mac.lower(), agent_open))
    if ssh is not None:
        watchers.append(_watch(lambda: ssh_banner(*ssh, _ATTEMPT_S), Evidence.SSH))
    if answer is not None:
        watchers.append(_watch(lambda: http_answer(*answer, _ATTEMPT_S), Evidence.ANSWER))
    if not watchers:
        raise ValueError("nothing to wait for: no agent and no port")
    tasks = [asyncio.ensure_future(watcher) for watcher in watchers]
    try:
        done, _ = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if not done:
        raise TimedOut(f"The guest did not become reachable within {timeout_s:g} s")
    return done.pop().result()


async def _watch(attempt: Callable[[], Awaitable[bool]], evidence: Evidence) -> Ready:
    pause_s = _SHORTEST_PAUSE_S
    while not await attempt():
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 1.5, _LONGEST_PAUSE_S)
    return Ready(evidence)


async def _watch_agent(agent: GuestAgent, mac: str, is_open: asyncio.Event | None) -> Ready:
    pause_s = _SHORTEST_PAUSE_S
    while True:
        if is_open is not None:
            try:
                async with asyncio.timeout(_AGENT_EVENT_S):
                    await is_open.wait()
            except TimeoutError:
                pass
        try:
            address = await find_guest_address(agent, mac, _ATTEMPT_S)
        except LumedError:
            address = None
        if address is not None:
            return Ready(Evidence.AGENT, address)
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 1.5, _LONGEST_PAUSE_S)


async def find_guest_address(agent: GuestAgent, mac: str, timeout_s: float) -> str | None:
    """The first usable IPv4 address on the card with this MAC (lower case); None without one.

    Raises as GuestAgent does.
    """
    for card in await agent.network_addresses(timeout_s):
        if card.mac != mac:
            continue
        for text in card.addresses:
            address = ipaddress.ip_address(text)
            if address.version == 4 and not (address.is_link_local or address.is_loopback):
                return text
    return None


async def ssh_banner(address: str, port: int, timeout_s: float) -> bool:
    """Whether an SSH server says its name there within timeout_s (RFC 4253, 4.2)."""
    return await _first_bytes(address, port, b"", len(b"SSH-"), timeout_s) == b"SSH-"


async def http_answer(address: str, port: int, timeout_s: float) -> bool:
    """Whether anything at all comes back for an HTTP request within timeout_s."""
    return bool(await _first_bytes(address, port, b"GET / HTTP/1.0\r\n\r\n", 1, timeout_s))


async def _first_bytes(
    address: str, port: int, request: bytes, count: int, timeout_s: float
) -> bytes:
    """The first `count` bytes that come from there; fewer or none if it fails or takes longer."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(address, port)
            try:
                writer.write(request)
                return await reader.readexactly(count)
            finally:
                writer.transport.abort()
    except asyncio.IncompleteReadError as error:
        return error.partial
    except (OSError, TimeoutError):
        return b""
