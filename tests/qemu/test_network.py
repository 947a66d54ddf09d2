import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lumed.errors import InvalidField, MachineFailed, NotPossibleHere
from lumed.model.run import NetDevice
from lumed.model.vm import PortForward
from lumed.network.addresses import list_addresses
from lumed.network.bridge import start_bridge, sweep_macvtaps
from lumed.network.user import start_user_network
from lumed.osproc import ProcessId, find_process, wait_gone
from tests.qemu.network_guest import Guest, Kernel, boot, make_kernel
from tests.qemu.network_world import (
    Outside,
    ask_mac,
    frame_bytes,
    make_syn,
    outside,
    send_frame,
    serve_on,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces")

UUID = "6a5e8c52-4b1e-4e0e-9d36-0d7c1ad9f0aa"
MAC = "52:54:00:4c:75:01"


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    directory = tmp_path_factory.mktemp("guest")
    yield make_kernel(directory)
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def peer() -> Iterator[Outside]:
    with outside(1) as made:
        yield made


def find_helpers(address: str) -> list[ProcessId]:
    """The passt that forwards from this address, and the guard that this test process started."""
    found = []
    for pid in [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]:
        try:
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
            parent = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]
        except OSError:
            continue
        guards = "passt_guard.py" in argv and parent == str(os.getpid())
        process = find_process(pid)
        if process is not None and (f"\0{address}/" in argv or guards):
            found.append(process)
    return found


async def assert_gone(helpers: list[ProcessId]) -> None:
    assert helpers
    for helper in helpers:
        assert await wait_gone(helper, 1.0), helper


def fetch(address: str, port: int) -> bytes:
    with socket.create_connection((address, port), timeout=10) as client:
        client.settimeout(10)
        seen = b""
        while chunk := client.recv(4096):
            seen += chunk
        return seen


async def test_a_guest_is_reached_at_its_address_and_reaches_the_outside(
    kernel: Kernel, peer: Outside, tmp_path: Path
) -> None:
    ports = [PortForward(7000, 7001)]
    async with start_user_network(uuid=UUID, ports=ports, log=tmp_path / "log") as net:
        running = boot(kernel, net, MAC)
        guest = await asyncio.to_thread(running.__enter__)
    try:
        assert net.address == next(list_addresses(UUID))
        helpers = find_helpers(net.address)
        await asyncio.to_thread(use_and_be_reached, guest, peer, net)
    finally:
        running.__exit__(None, None, None)
    await assert_gone(helpers)


def use_and_be_reached(guest: Guest, peer: Outside, net: NetDevice) -> None:
    guest.use_dhcp()
    assert "inet 10.0.2.15/24" in guest.run("ip address show eth0")
    assert "reached" in ask_web(guest, peer.address, 80)
    assert net.address is not None
    for port, guest_port in ((22, 22), (8000, 8000), (7001, 7000)):
        serve_once(guest, guest_port)
        assert fetch(net.address, port) == f"guest-{guest_port}\n".encode()


def ask_closed_ports(address: str) -> list[str]:
    """What clients see that send a request 10 ms after they were let in, which is not slow."""
    seen = []
    for port in [8080, 8443] * 10:
        with socket.create_connection((address, port), timeout=10) as client:
            try:
                time.sleep(0.01)
                client.sendall(b"GET / HTTP/1.0\r\n\r\n")
                seen.append("an answer" if client.recv(1) else "a bare end")
            except (ConnectionResetError, BrokenPipeError):
                seen.append("a reset")
    return seen


async def test_who_asks_a_port_that_the_guest_refuses_is_refused(
    kernel: Kernel, tmp_path: Path
) -> None:
    """Clients that poll for a server take a reset for "not yet", and a bare end for broken."""
    async with start_user_network(uuid=UUID, ports=(), log=tmp_path / "log") as net:
        assert net.address is not None
        with boot(kernel, net, MAC) as guest:
            await asyncio.to_thread(guest.use_dhcp)
            seen = await asyncio.to_thread(ask_closed_ports, net.address)
    assert set(seen) == {"a reset"}, seen


def serve_once(guest: Guest, port: int) -> None:
    guest.run(f"echo guest-{port} | nc -l -p {port} &")
    guest.run(f"until netstat -ltn | grep -q ':{port} '; do :; done")


def ask_web(guest: Guest, address: str, port: int, wait_s: int = 10) -> str:
    """What a web server answers to a request whose Host header would please a local one.

    nc, since wget of Debian's static busybox crashes where there are no service names; its
    input stays open, since passt of 2023 may lose the server's end after the guest's.
    """
    request = f"GET / HTTP/1.0\\r\\nHost: localhost:{port}\\r\\n\\r\\n"
    return guest.run(
        f"mkfifo /line; exec 3<>/line; printf '{request}' >&3; "
        f"nc -w {wait_s} {address} {port} <&3; exec 3>&-; rm /line"
    )


ROUTE_LOOPBACK_OUT = (
    "ip address flush dev lo; ip route flush table local dev lo; "
    "echo 1 >/proc/sys/net/ipv4/conf/all/route_localnet; ip route add 127.0.0.0/8 via 10.0.2.2"
)


def try_everything(guest: Guest, port: int, targets: list[str]) -> None:
    """Try to fetch from the host's loopback, with a Host header that would please its server."""
    guest.use_dhcp()
    guest.run(ROUTE_LOOPBACK_OUT)
    assert "127.0.0.1 via 10.0.2.2 dev eth0" in guest.run("ip route get 127.0.0.1")
    for target in targets:
        assert "reached" not in ask_web(guest, target, port, wait_s=1)


def list_targets(peer: Outside) -> list[str]:
    own = ["10.0.2.2", "10.0.2.3", "10.0.2.15", "127.0.0.1", "127.77.200.9", "127.0.0.53"]
    return [*own, peer.host_address, "169.254.1.2", "fe80::1%eth0", "fe80::2%eth0"]


async def test_a_guest_cannot_reach_the_hosts_loopback(
    kernel: Kernel, peer: Outside, tmp_path: Path
) -> None:
    with serve_on(["127.0.0.1", "127.77.200.9", "::1"]) as server:
        async with start_user_network(uuid=UUID, ports=(), log=tmp_path / "log") as net:
            running = boot(kernel, net, MAC)
            guest = await asyncio.to_thread(running.__enter__)
        try:
            await asyncio.to_thread(try_everything, guest, server.port(), list_targets(peer))
            fetched = ask_web(guest, peer.address, 80)
        finally:
            running.__exit__(None, None, None)
    assert "reached" in fetched
    assert server.visits == []


async def test_frames_made_by_hand_do_not_reach_the_hosts_loopback(
    peer: Outside, tmp_path: Path
) -> None:
    addresses = ["127.0.0.1", "127.77.200.9", "::1", peer.host_address]
    with serve_on(addresses) as server:
        async with start_user_network(uuid=UUID, ports=(), log=tmp_path / "log") as net:
            with socket.socket(fileno=os.dup(net.pass_fds[0])) as link:
                await asyncio.to_thread(send_syns, link, server.port())
                assert server.visits == []
                # The same frame to an address of the host that is no loopback one arrives, which
                # shows that the others were well made.
                await asyncio.to_thread(
                    send_syn, link, "10.0.2.15", peer.host_address, server.port()
                )
        assert server.visits == [peer.host_address]


def send_syns(link: socket.socket, port: int) -> None:
    gateway = ask_mac(link, "10.0.2.2", "10.0.2.15")
    for target in ("127.0.0.1", "127.77.200.9", "0.0.0.0", "10.0.2.2", "10.0.2.3"):  # noqa: S104
        for source in ("10.0.2.15", "127.0.0.1"):
            send_frame(link, *make_syn(source, target, port), gateway)
    for target in ("::1", "::", "::ffff:127.0.0.1", "fe80::1"):
        send_frame(link, *make_syn("fe80::15", target, port), gateway)
    ask_mac(link, "10.0.2.2", "10.0.2.15")
    # ARP may overtake frames of its own read, but none of those of the read before.
    ask_mac(link, "10.0.2.2", "10.0.2.15")


def send_syn(link: socket.socket, source: str, target: str, port: int) -> None:
    gateway = ask_mac(link, "10.0.2.2", source)
    send_frame(link, *make_syn(source, target, port), gateway)
    ask_mac(link, "10.0.2.2", source)
    ask_mac(link, "10.0.2.2", source)


async def test_a_syn_that_is_sent_twice_at_once_does_not_stop_the_network(
    peer: Outside, tmp_path: Path
) -> None:
    async with start_user_network(uuid=UUID, ports=(), log=tmp_path / "log") as net:
        with socket.socket(fileno=os.dup(net.pass_fds[0])) as link:
            await asyncio.to_thread(send_syn_twice, link, peer.address)


def send_syn_twice(link: socket.socket, target: str) -> None:
    gateway = ask_mac(link, "10.0.2.2", "10.0.2.15")
    kind, packet = make_syn("10.0.2.15", target, 80)
    link.sendall(frame_bytes(kind, packet, gateway) * 2)
    ask_mac(link, "10.0.2.2", "10.0.2.15")
    ask_mac(link, "10.0.2.2", "10.0.2.15")


async def test_two_machines_of_one_uuid_get_two_addresses(tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with (
        start_user_network(uuid=UUID, ports=(), log=log) as first,
        start_user_network(uuid=UUID, ports=(), log=log) as second,
        start_user_network(uuid="another", ports=(), log=log) as third,
    ):
        assert len({first.address, second.address, third.address}) == 3


async def test_passt_ends_when_no_machine_takes_it(tmp_path: Path) -> None:
    async with start_user_network(uuid=UUID, ports=(), log=tmp_path / "log") as net:
        assert net.address is not None
        helpers = find_helpers(net.address)
    await assert_gone(helpers)


START_AND_DIE = """
import asyncio, os, signal, sys
from pathlib import Path
from lumed.network.user import start_user_network
async def main():
    async with start_user_network(uuid="dying", ports=(), log=Path(sys.argv[1])) as net:
        print(net.address, net.problem, flush=True)
        if sys.argv[2:]:
            os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""


def run_script(*argv: str | Path, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, sys.executable, "-c", START_AND_DIE, *argv],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


async def test_passt_ends_when_the_server_is_killed_before_the_machine_starts(
    tmp_path: Path,
) -> None:
    told = await asyncio.to_thread(run_script, tmp_path / "log", "die")
    assert told.returncode == -signal.SIGKILL, told
    address = told.stdout.split()[0]
    for helper in find_helpers(address):
        assert await wait_gone(helper, 1.0)


async def test_a_host_without_a_route_still_forwards_and_says_what_is_missing(
    tmp_path: Path,
) -> None:
    alone = ("unshare", "--net", "sh", "-c", 'ip link set lo up; exec "$@"', "sh")
    told = await asyncio.to_thread(run_script, tmp_path / "log", before=alone)
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith(next(list_addresses("dying")))
    assert "no default route" in told.stdout


async def test_a_passt_that_fails_is_an_error_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "passt"
    program.write_text("#!/bin/sh\necho Out of luck >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(MachineFailed, match="status 3: Out of luck"):
        async with start_user_network(uuid=UUID, ports=(), log=tmp_path / "log"):
            pass


async def test_without_passt_the_guest_is_reached_and_reaches_nothing(
    kernel: Kernel, peer: Outside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_on(["127.0.0.1", "127.77.200.9", "::1"]) as server:
        with monkeypatch.context() as patch:
            patch.setenv("PATH", str(tmp_path))
            async with start_user_network(uuid=UUID, ports=(), log=tmp_path / "log") as net:
                pass
        assert net.problem is not None
        assert "sudo apt-get install passt" in net.problem
        running = boot(kernel, net, MAC)
        guest = await asyncio.to_thread(running.__enter__)
        try:
            await asyncio.to_thread(try_everything, guest, server.port(), list_targets(peer))
            assert "reached" not in ask_web(guest, peer.address, 80)
            serve_once(guest, 22)
            assert net.address is not None
            assert await asyncio.to_thread(fetch, net.address, 22) == b"guest-22\n"
        finally:
            running.__exit__(None, None, None)
    assert server.visits == []


def reach_as_neighbour(guest: Guest, peer: Outside) -> bool:
    subnet = peer.address.rpartition(".")[0]
    guest.run(f"ip address add {subnet}.77/24 dev eth0; ip link set eth0 up")
    return "reached" in ask_web(guest, peer.address, 80)


def list_interfaces() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


async def test_a_bridged_guest_is_a_neighbour_and_its_tap_goes_with_it(kernel: Kernel) -> None:
    with outside(2, bridged=True) as peer:
        before = list_interfaces()
        async with start_bridge(peer.interface, MAC, UUID) as net:
            running = boot(kernel, net, MAC)
            guest = await asyncio.to_thread(running.__enter__)
        try:
            assert await asyncio.to_thread(reach_as_neighbour, guest, peer)
            assert len(list_interfaces() - before) == 1
        finally:
            guest.process.kill()
            running.__exit__(None, None, None)
        assert list_interfaces() == before


async def test_a_plain_card_gets_a_macvtap_that_is_swept_once_the_guest_has_ended(
    kernel: Kernel,
) -> None:
    with outside(3) as peer:
        before = list_interfaces()
        async with start_bridge(peer.interface, MAC, UUID) as net:
            assert await sweep_macvtaps() == ()
            running = boot(kernel, net, MAC)
            guest = await asyncio.to_thread(running.__enter__)
        try:
            assert await asyncio.to_thread(reach_as_neighbour, guest, peer)
            assert await sweep_macvtaps() == ()
        finally:
            running.__exit__(None, None, None)
        assert len(await sweep_macvtaps()) == 1
        assert list_interfaces() == before


async def test_an_unknown_interface_is_refused_with_those_that_exist() -> None:
    with pytest.raises(InvalidField, match=r"'nosuch0'.*\blo\b"):
        async with start_bridge("nosuch0", MAC, UUID):
            pass


async def test_the_loopback_is_nothing_to_bridge_to() -> None:
    with pytest.raises(NotPossibleHere, match="neither a bridge nor an Ethernet card"):
        async with start_bridge("lo", MAC, UUID):
            pass


async def test_bridging_without_root_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NotPossibleHere, match="needs root"):
        async with start_bridge("lo", MAC, UUID):
            pass
