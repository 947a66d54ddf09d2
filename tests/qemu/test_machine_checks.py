from pathlib import Path

import pytest

from lumed.machine.qemu import checks
from lumed.machine.qemu.checks import check_machine
from lumed.machine.qemu.virtiofs import Virtiofsd, VirtiofsdFlavour, find_virtiofsd


def make_program(path: Path, says: str) -> str:
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return str(path)


async def test_this_host_has_what_machines_need(tmp_path: Path) -> None:
    found = {check.name: check for check in await check_machine(tmp_path)}
    assert list(found) == [
        *("QEMU", "qemu-img", "UEFI firmware", "accelerator", "virtiofsd", "arm64 guests")
    ]
    assert found["QEMU"].ok
    assert found["qemu-img"].ok
    assert found["UEFI firmware"].ok
    assert found["accelerator"].value in ("kvm", "tcg")


async def test_software_emulation_that_was_asked_for_is_no_fault(tmp_path: Path) -> None:
    found = {check.name: check for check in await check_machine(tmp_path, accel="tcg")}
    assert found["accelerator"].ok
    assert found["accelerator"].value == "tcg"


async def test_missing_programs_name_their_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = {check.name: check for check in await check_machine(tmp_path)}
    for name, package in (("QEMU", "qemu-system-x86"), ("qemu-img", "qemu-utils")):
        assert not found[name].ok
        assert package in str(found[name].hint)
    assert found["accelerator"].value == "unknown"
    # Few need it.
    assert (found["arm64 guests"].ok, found["arm64 guests"].value) == (True, "not possible")
    assert "qemu-system-arm qemu-efi-aarch64" in found["arm64 guests"].detail


async def test_an_old_qemu_is_named_with_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_program(tmp_path / "qemu-system-x86_64", "QEMU emulator version 6.2.0 (Debian)")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = (await check_machine(tmp_path, accel="tcg"))[0]
    assert (found.ok, found.value) == (False, "6.2.0")
    assert "older than 7.2" in found.detail


async def test_both_kinds_of_virtiofsd_are_told_apart(tmp_path: Path) -> None:
    old = make_program(tmp_path / "c", "virtiofsd version 7.2.22 (Debian)\nCopyright (c) 2003")
    new = make_program(tmp_path / "rust", "virtiofsd 1.13.2")
    missing = str(tmp_path / "missing")
    assert await find_virtiofsd((missing, new, old)) == Virtiofsd(
        Path(new), VirtiofsdFlavour.RUST, "1.13.2"
    )
    found = await find_virtiofsd((old,))
    assert found == Virtiofsd(Path(old), VirtiofsdFlavour.C, "7.2.22")
    assert await find_virtiofsd((missing,)) is None


def test_the_mending_line_fits_the_family(tmp_path: Path) -> None:
    release = tmp_path / "os-release"
    release.write_text('ID=linuxmint\nID_LIKE="ubuntu debian"\n')
    assert checks._install("ovmf", release) == "sudo apt-get install ovmf"
    release.write_text("ID=fedora\n")
    assert "apt-get" not in checks._install("ovmf", release)
