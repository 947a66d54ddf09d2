"""An arm64 guest on a host of another kind, from the image to the power button."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from lumed.errors import InvalidField, MissingDependency
from lumed.machine.qemu.driver import QemuDriver
from lumed.model.host import Accelerator
from lumed.model.vm import Architecture, Firmware
from lumed.server import get_qemu
from tests.system.arm64_guest import MENU, READY, build_arm64_disk
from tests.system.harness import Server, running_server

ARM64 = Architecture.ARM64


@pytest.fixture
def server(tmp_path: Path, image_cache: Path) -> Iterator[Server]:
    """A server that is told to use KVM, which it cannot for another processor."""
    with running_server(tmp_path / "home", image_cache, env={"LUME_ACCEL": "kvm"}) as server:
        yield server


def test_an_arm64_guest_boots_shows_its_screen_and_heeds_the_power_button(
    server: Server, tmp_path: Path
) -> None:
    disk = build_arm64_disk(tmp_path)
    server.create("arm", image=str(disk))
    refusal = server.call("POST", "/vms/arm/run", 501, json={"recoveryMode": True})
    assert "The rescue system is made for amd64" in refusal["error"]

    vm = server.run("arm")
    assert (vm["architecture"], vm["accelerator"], vm["firmware"]) == ("arm64", "tcg", "uefi")
    server.wait_serial("arm", MENU, 100)
    menu = take_screenshot(server)
    assert struct.unpack_from(">4x4sII", menu, 8) == (b"IHDR", 1024, 768)
    # Should the firmware miss the key, the menu goes on by itself.
    with server.typing(""):
        server.wait_serial("arm", READY, 100)
    # This kernel has no driver for the screen, and QEMU says so in the picture.
    assert take_screenshot(server) != menu
    with socket.create_connection(("127.0.0.1", vm["vncPort"]), timeout=10) as screen:
        assert screen.recv(4) == b"RFB "

    server.call("POST", "/vms/arm/stop", json={})
    stopped = server.wait_for("arm", lambda vm: vm["state"] == "stopped", 25)
    assert stopped["lastEnd"]["step"] == "power-button"
    assert "power button pressed" in (server.vm_dir("arm") / "serial.log").read_text()


def take_screenshot(server: Server) -> bytes:
    with server.client() as client:
        return client.get("/vms/arm/screenshot").raise_for_status().content


async def foreign(_: Architecture) -> Accelerator:
    return Accelerator("tcg", "tests")


async def test_a_host_without_qemu_for_arm64_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependency, match="qemu-system-aarch64") as error:
        await QemuDriver(get_qemu, foreign).check_ready(ARM64, Firmware.UEFI)
    assert error.value.hint == "sudo apt-get install qemu-system-arm qemu-efi-aarch64"


async def test_bios_is_nothing_for_arm64() -> None:
    with pytest.raises(InvalidField) as error:
        await QemuDriver(get_qemu, foreign).check_ready(ARM64, Firmware.BIOS)
    assert error.value.fields == {"firmware": "arm64 guests boot by UEFI only"}
