"""A machine on a bridge, as root: the address that counts is the one its guest was given."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.qemu.network_world import Outside, outside
from tests.system.harness import Server, get_line

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="bridges need root")


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Outside]:
    """A bridge of this host with a DHCP server behind it."""
    number = 61
    settings = tmp_path / "udhcpd.conf"
    (tmp_path / "leases").touch()
    with outside(number, bridged=True) as place:
        settings.write_text(
            f"interface {place.far}\nstart 10.213.{number}.50\nend 10.213.{number}.59\n"
            f"lease_file {tmp_path}/leases\npidfile {tmp_path}/pid\noption subnet 255.255.255.0\n"
        )
        server = subprocess.Popen(
            ["ip", "netns", "exec", place.namespace, "busybox", "udhcpd", "-f", str(settings)]
        )
        try:
            yield place
        finally:
            server.kill()
            server.wait()


def test_a_bridged_guest_is_reached_where_its_dhcp_server_put_it(
    server: Server, office: Outside
) -> None:
    server.create("web", network=f"bridged:{office.interface}")
    vm = server.boot("web")
    assert vm["networkMode"] == f"bridged:{office.interface}"
    assert vm["ipAddress"].startswith("10.213.61.5")
    assert "forwards" not in vm
    assert get_line(vm["ipAddress"], 8000).startswith("lumed tiny web")
    server.call("POST", "/vms/web/stop", 200)
    give_up_at = time.monotonic() + 10
    while list(Path(f"/sys/class/net/{office.interface}/brif").glob("tap*")):
        assert time.monotonic() < give_up_at, "the tap is still a port of the bridge"
        time.sleep(0.02)


def test_an_unknown_interface_is_named_before_the_run_is_accepted(server: Server) -> None:
    server.create("web", image=None)
    reply = server.call("POST", "/vms/web/run", 422, json={"network": "bridged:none99"})
    assert "none99" in reply["fields"]["network"]
