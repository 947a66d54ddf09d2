import re
import socket
import struct
from ipaddress import IPv4Address, IPv4Network
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumed.errors import InvalidField
from lumed.model.vm import PortForward
from lumed.network.addresses import can_bind, choose_place, list_addresses
from lumed.network.host import parse_default_interface, parse_nameservers
from lumed.network.passt_guard import (
    Presence,
    is_allowed,
    is_refusal,
    make_missing_ack,
    make_refusal,
)
from lumed.network.plan import COMMON_PORTS, Network, NetworkKind, parse_network, plan_forwards

PORTS = st.integers(1, 65535)
USER_PORTS = st.lists(
    st.builds(PortForward, PORTS, st.none() | PORTS, st.sampled_from(["tcp", "udp"])), max_size=30
)


@pytest.mark.parametrize(
    ("word", "network"),
    [
        ("none", Network(NetworkKind.NONE)),
        ("nat", Network(NetworkKind.NAT)),
        ("bridged", Network(NetworkKind.BRIDGED)),
        ("bridged:br0", Network(NetworkKind.BRIDGED, "br0")),
        ("bridged:enp3s0.12", Network(NetworkKind.BRIDGED, "enp3s0.12")),
    ],
)
def test_a_network_word_is_parsed_and_printed(word: str, network: Network) -> None:
    assert parse_network(word) == network
    assert str(network) == word


@pytest.mark.parametrize(
    "word",
    [
        "",
        "NAT",
        "nat:eth0",
        "bridged:",
        "bridged:a/b",
        "bridged:..",
        "bridged:sixteen-letters-",
        "x",
    ],
)
def test_another_network_word_is_refused_with_the_known_ones(word: str) -> None:
    with pytest.raises(InvalidField, match=re.escape(f'"none", not {word!r}')) as caught:
        parse_network(word)
    assert "network" in caught.value.fields


def test_common_ports_keep_their_numbers_where_low_ports_are_allowed() -> None:
    forwards = plan_forwards("127.77.1.1", (), 0)
    assert [(f.port, f.guest_port) for f in forwards] == [(port, port) for port in COMMON_PORTS]


def test_low_ports_are_moved_up_where_they_are_not_allowed() -> None:
    planned = {f.guest_port: f.port for f in plan_forwards("127.77.1.1", (), 1024)}
    assert planned[22] == 10022
    assert planned[8080] == 8080


def test_the_vms_own_ports_come_before_common_ones() -> None:
    planned = plan_forwards("127.77.1.1", [PortForward(9000, 80), PortForward(53, None, "udp")], 0)
    assert (planned[0].port, planned[0].guest_port) == (80, 9000)
    assert (planned[1].port, planned[1].protocol) == (53, "udp")
    assert {f.port: f.guest_port for f in planned}[10080] == 80


@given(ports=USER_PORTS, lowest=st.sampled_from([0, 80, 1024]), held=st.sets(PORTS, max_size=5))
def test_every_port_has_one_usable_place(
    ports: list[PortForward], lowest: int, held: set[int]
) -> None:
    taken = {("tcp", port) for port in held}
    forwards = plan_forwards("127.77.1.1", ports, lowest, taken)
    places = [(f.protocol, f.port) for f in forwards]
    assert len(set(places)) == len(places)
    assert not taken.intersection(places)
    assert all(lowest <= f.port <= 65535 for f in forwards)
    reached = {(f.protocol, f.guest_port) for f in forwards}
    assert reached == {(p.protocol, p.guest_port) for p in ports} | {
        ("tcp", port) for port in COMMON_PORTS
    }


@given(st.uuids().map(str))
def test_addresses_begin_with_the_same_one_and_stay_in_the_range(uuid: str) -> None:
    first = list(islice(list_addresses(uuid), 300))
    assert first == list(islice(list_addresses(uuid), 300))
    assert len(set(first)) == 300
    for address in map(IPv4Address, first):
        assert address in IPv4Network("127.77.0.0/16")
        assert str(address) not in ("127.77.0.0", "127.77.255.255")


def test_a_taken_address_is_passed_over() -> None:
    own, following = islice(list_addresses("some"), 2)
    assert choose_place("some", (), 1024, ()).address == own
    assert choose_place("some", (), 1024, {own}).address == following


def test_an_address_where_somebody_listens_is_passed_over() -> None:
    own, following = islice(list_addresses("other"), 2)
    with socket.create_server((own, 8080)):
        place = choose_place("other", (), 1024, ())
    assert place.address == following
    assert not place.held


def test_a_port_that_is_held_on_all_addresses_is_moved_and_the_address_kept() -> None:
    with socket.create_server(("0.0.0.0", 0)) as server:  # noqa: S104
        port = server.getsockname()[1]
        place = choose_place("third", [PortForward(7, port)], 1024, ())
        assert not can_bind("127.77.0.9", "tcp", port)
    assert place.held == {("tcp", port)}
    moved = next(f.port for f in place.forwards if f.guest_port == 7)
    assert moved != port
    assert place.address == next(list_addresses("third"))


def test_the_default_route_of_lowest_metric_names_the_interface() -> None:
    head = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"
    slow = "wlan0 00000000 0100A8C0 0003 0 0 600 00000000 0 0 0\n"
    fast = "eth0 00000000 010200C0 0003 0 0 100 00000000 0 0 0\n"
    near = "eth1 000200C0 00000000 0001 0 0 0 00FFFFFF 0 0 0\n"
    assert parse_default_interface(head + near + slow + fast) == "eth0"
    assert parse_default_interface(head + near) is None
    assert parse_default_interface("") is None


def test_only_name_servers_that_a_guest_can_reach_are_taken() -> None:
    text = """# made by hand
search example.org
nameserver 127.0.0.53
nameserver fe80::1%eth0
nameserver 192.0.2.53 # the router
nameserver
nameserver 0.0.0.0
"""
    assert parse_nameservers(text) == ("192.0.2.53",)


def ethernet(kind: bytes, source: str = "10.0.2.15", target: str = "192.0.2.1") -> bytes:
    addresses = IPv4Address(source).packed + IPv4Address(target).packed
    return bytes(12) + kind + b"\x45" + bytes(11) + addresses + bytes(20)


@pytest.mark.parametrize("target", ["127.0.0.1", "127.77.3.4", "0.0.0.0", "0.1.2.3"])  # noqa: S104
def test_the_guard_drops_what_goes_to_the_loopback(target: str) -> None:
    assert not is_allowed(ethernet(b"\x08\x00", target=target))


def test_the_guard_drops_what_claims_to_come_from_the_loopback_and_ipv6() -> None:
    assert not is_allowed(ethernet(b"\x08\x00", source="127.0.0.1"))
    assert not is_allowed(ethernet(b"\x86\xdd"))
    assert not is_allowed(ethernet(b"\x81\x00"))
    assert not is_allowed(ethernet(b"\x08\x00")[:33])


def test_the_guard_passes_arp_dhcp_and_the_outside() -> None:
    assert is_allowed(ethernet(b"\x08\x06"))
    assert is_allowed(ethernet(b"\x08\x00", "0.0.0.0", "255.255.255.255"))  # noqa: S104
    assert is_allowed(ethernet(b"\x08\x00"))


def test_the_guard_acknowledges_a_syn_ack_and_nothing_else() -> None:
    guest, gateway = bytes.fromhex("525400000001"), bytes.fromhex("9a559a559a55")
    addresses = IPv4Address("10.0.2.15").packed + IPv4Address("10.0.2.2").packed
    header = gateway + guest + b"\x08\x00\x45" + bytes(8) + b"\x06" + bytes(2) + addresses
    syn_ack = struct.pack("!HHIIBBHHH", 22, 40_000, 0xFFFFFFFF, 77, 6 << 4, 0x12, 100, 0, 0)
    ack = make_missing_ack(header + syn_ack + bytes(4))
    assert ack is not None
    assert ack[:12] == guest + gateway
    assert ack[26:34] == addresses[4:] + addresses[:4]
    assert struct.unpack("!HHIIBB", ack[34:48]) == (40_000, 22, 77, 0, 5 << 4, 0x10)
    for flags in (0x02, 0x10, 0x11, 0x14, 0x18):
        other = syn_ack[:13] + bytes([flags]) + syn_ack[14:]
        assert make_missing_ack(header + other + bytes(4)) is None
    assert make_missing_ack((header + syn_ack)[:50]) is None


@given(st.binary(max_size=120))
def test_no_frame_is_too_odd_for_the_guard(frame: bytes) -> None:
    odd = bytes(12) + b"\x08\x00" + frame[:9] + b"\x06" + frame[9:]
    for whole in (frame, odd):
        is_allowed(whole)
        make_missing_ack(whole)
        is_refusal(whole)


def tcp_frame(flags: int, source: str = "10.0.2.2", target: str = "10.0.2.15") -> bytes:
    """A segment for the guest, sent to every MAC address as passt does at first."""
    addresses = IPv4Address(source).packed + IPv4Address(target).packed
    header = b"\xff" * 6 + bytes.fromhex("9a559a559a55") + b"\x08\x00\x45" + bytes(8) + b"\x06"
    segment = struct.pack("!HHIIBBHHH", 40_000, 22, 99, 0, 5 << 4, flags, 100, 0, 0)
    return header + bytes(2) + addresses + segment


def test_the_guard_refuses_a_syn_in_the_guests_name_and_nothing_else() -> None:
    reset = make_refusal(tcp_frame(0x02))
    assert reset is not None
    assert reset[:6] == bytes.fromhex("9a559a559a55")
    assert not reset[6] & 1
    assert reset[26:34] == IPv4Address("10.0.2.15").packed + IPv4Address("10.0.2.2").packed
    assert struct.unpack("!HHIIBB", reset[34:48]) == (22, 40_000, 0, 100, 5 << 4, 0x14)
    for flags in (0x10, 0x12, 0x11, 0x14, 0x18):
        assert make_refusal(tcp_frame(flags)) is None


def test_a_guests_refusal_is_told_from_its_other_resets() -> None:
    refusal = make_refusal(tcp_frame(0x02))
    assert refusal is not None
    assert is_refusal(refusal)
    assert not is_refusal(refusal + bytes(1000))
    # In the middle of a connection a reset has the next sequence number.
    assert not is_refusal(tcp_frame(0x14))
    for flags in (0x02, 0x04, 0x10, 0x11, 0x12):
        assert not is_refusal(refusal[:47] + bytes([flags]) + refusal[48:])


def test_a_guest_is_there_once_it_has_an_address_and_until_it_asks_for_one_again() -> None:
    presence = Presence()
    asks = ethernet(b"\x08\x00", "0.0.0.0", "255.255.255.255")  # noqa: S104
    offer = tcp_frame(0)[:23] + b"\x11" + tcp_frame(0)[24:34] + b"\x00\x43\x00\x44" + bytes(20)
    presence.notice_guest(asks)
    assert not presence.is_up
    presence.notice_passt(tcp_frame(0x02))
    assert not presence.is_up
    presence.notice_passt(offer)
    assert presence.is_up
    presence.notice_guest(ethernet(b"\x08\x00"))
    assert presence.is_up
    presence.notice_guest(asks)
    assert not presence.is_up
