"""What `lume doctor` says about the machine side: QEMU and its parts on this host."""

from __future__ import annotations

import asyncio
from pathlib import Path

from lumed.errors import LumedError, MissingDependency
from lumed.machine.qemu.accel import find_accelerator, read_qemu_version
from lumed.machine.qemu.firmware import find_uefi
from lumed.machine.shares import find_share_support
from lumed.model.host import Check
from lumed.model.vm import Architecture
from lumed.osproc import get_program

OLDEST_QEMU = (7, 2)
QEMU = "qemu-system-x86_64"
_QEMU_ARM64 = "qemu-system-aarch64"


async def check_machine(cache_dir: Path, *, accel: str | None = None) -> list[Check]:
    """Look at QEMU and what it needs, virtiofsd, and what arm64 guests need; never raises for them.

    `accel` is the accelerator that the settings ask for. The first call after a boot takes up
    to 6 s, for the test of KVM.
    """
    return list(
        await asyncio.gather(
            _check_qemu(),
            _check_qemu_img(),
            _check_uefi(),
            _check_accelerator(cache_dir, accel),
            _check_virtiofsd(),
            asyncio.to_thread(_check_arm64),
        )
    )


async def _check_qemu() -> Check:
    try:
        qemu = get_program(QEMU, package="qemu-system-x86")
        version = await read_qemu_version(qemu)
    except MissingDependency:
        return Check(
            "QEMU", False, "missing", f"{QEMU} is not in PATH", _install("qemu-system-x86")
        )
    except LumedError as error:
        return Check("QEMU", False, "broken", error.message, _install("qemu-system-x86"))
    oldest = ".".join(map(str, OLDEST_QEMU))
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_QEMU:
        detail = f"{qemu} is older than {oldest}, which lumed needs"
        return Check("QEMU", False, version, detail, "upgrade to Debian 12, Ubuntu 24.04 or later")
    return Check("QEMU", True, version, f"{qemu}, at least {oldest} is needed")


async def _check_qemu_img() -> Check:
    try:
        path = get_program("qemu-img", package="qemu-utils")
    except MissingDependency:
        detail = "qemu-img is not in PATH; disks cannot be made"
        return Check("qemu-img", False, "missing", detail, _install("qemu-utils"))
    return Check("qemu-img", True, "found", str(path))


async def _check_uefi() -> Check:
    try:
        firmware = await asyncio.to_thread(find_uefi)
    except MissingDependency as error:
        detail = f"{error.message}; only BIOS guests can run"
        return Check("UEFI firmware", False, "missing", detail, _install("ovmf"))
    return Check("UEFI firmware", True, firmware.code.name, str(firmware.code))


async def _check_accelerator(cache_dir: Path, wanted: str | None) -> Check:
    try:
        qemu = get_program(QEMU, package="qemu-system-x86")
        found = await find_accelerator(cache_dir, qemu, override=wanted)
    except LumedError as error:
        return Check("accelerator", False, "unknown", error.message, error.hint)
    slow = "" if found.name == "kvm" else "; guests run in software emulation, many times slower"
    ok = found.name == "kvm" or wanted == "tcg"
    return Check("accelerator", ok, found.name, found.reason + slow, found.hint)


async def _check_virtiofsd() -> Check:
    support = await find_share_support()
    found = support.virtiofsd
    if found is None:
        detail = (
            f"{support.problem}; shared directories use 9p instead, which is slower and which "
            "Debian's cloud kernel lacks"
        )
        return Check("virtiofsd", False, "not usable", detail, support.hint)
    how = f"{found.path}, in a user namespace" if support.prefix else str(found.path)
    return Check("virtiofsd", True, f"{found.version} ({found.flavour})", how)


def _check_arm64() -> Check:
    packages = "qemu-system-arm qemu-efi-aarch64"
    try:
        qemu = get_program(_QEMU_ARM64, package=packages)
        find_uefi(architecture=Architecture.ARM64)
    except MissingDependency as error:
        # Most users have no such image: nothing that is wrong with this host.
        detail = f"{error.message}; {_install(packages)}"
        return Check("arm64 guests", True, "not possible", detail)
    return Check("arm64 guests", True, "emulated", str(qemu))


def _install(package: str, os_release: Path = Path("/etc/os-release")) -> str:
    """The line that installs a Debian package, or words for hosts of another family."""
    try:
        lines = os_release.read_text().splitlines()
    except OSError:
        lines = []
    family = " ".join(line for line in lines if line.startswith(("ID=", "ID_LIKE=")))
    if "debian" in family or "ubuntu" in family:
        return f"sudo apt-get install {package}"
    return f"install what Debian calls {package} with this system's package tool"
