"""UEFI firmware (OVMF; AAVMF for arm64): where this host has it, and each VM's own variables.

SeaBIOS needs none of this: QEMU brings it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from lumed.errors import MissingDependency
from lumed.model.vm import Architecture
from lumed.osproc import get_program, run_tool

# Builds without Secure Boot: those with it need SMM, and refuse unsigned rescue systems. The
# 4 MB builds come first, since distributions are dropping the 2 MB ones.
_KNOWN_AMD64 = (
    ("usr/share/OVMF/OVMF_CODE_4M.fd", "usr/share/OVMF/OVMF_VARS_4M.fd"),  # Debian, Ubuntu
    ("usr/share/edk2/x64/OVMF_CODE.4m.fd", "usr/share/edk2/x64/OVMF_VARS.4m.fd"),  # Arch
    ("usr/share/edk2/ovmf/OVMF_CODE.fd", "usr/share/edk2/ovmf/OVMF_VARS.fd"),  # Fedora
    ("usr/share/OVMF/OVMF_CODE.fd", "usr/share/OVMF/OVMF_VARS.fd"),  # older Debian, Ubuntu
)
_KNOWN_ARM64 = (
    ("usr/share/AAVMF/AAVMF_CODE.fd", "usr/share/AAVMF/AAVMF_VARS.fd"),  # Debian, Ubuntu
    (  # Fedora
        "usr/share/edk2/aarch64/QEMU_EFI-pflash.raw",
        "usr/share/edk2/aarch64/vars-template-pflash.raw",
    ),
)
# What distributions tell programs like this one; docs/interop/firmware.json in QEMU's source.
_DESCRIPTORS = ("etc/qemu/firmware", "usr/share/qemu/firmware")


@dataclass(frozen=True, slots=True)
class UefiFirmware:
    """A matching pair of raw flash images: shared read-only code, and the empty variables."""

    code: Path
    vars_template: Path


@dataclass(frozen=True, slots=True)
class _Kind:
    """The firmware of one architecture: name and machine are those of the descriptors."""

    known: tuple[tuple[str, str], ...]
    name: str
    machine: str
    project: str
    package: str


_KINDS = {
    Architecture.AMD64: _Kind(_KNOWN_AMD64, "x86_64", "pc-q35-7.2", "OVMF", "ovmf"),
    Architecture.ARM64: _Kind(_KNOWN_ARM64, "aarch64", "virt-7.2", "AAVMF", "qemu-efi-aarch64"),
}


def find_uefi(
    root: Path = Path("/"), *, architecture: Architecture = Architecture.AMD64
) -> UefiFirmware:
    """The architecture's UEFI firmware without Secure Boot on the file system at root.

    Raises MissingDependency if there is none.
    """
    kind = _KINDS[architecture]
    for code, variables in kind.known:
        firmware = UefiFirmware(root / code, root / variables)
        if _is_complete(firmware):
            return firmware
    for folder in _DESCRIPTORS:
        for descriptor in sorted((root / folder).glob("*.json")):
            described = _read_descriptor(descriptor, root, kind)
            if described is not None and _is_complete(described):
                return described
    raise MissingDependency(
        f"No UEFI firmware ({kind.project}) for {kind.name} is installed",
        hint=f"sudo apt-get install {kind.package}",
    )


def _is_complete(firmware: UefiFirmware) -> bool:
    return firmware.code.is_file() and firmware.vars_template.is_file()


def _read_descriptor(path: Path, root: Path, kind: _Kind) -> UefiFirmware | None:
    """The firmware that a descriptor names, if it suits our machine; None for any other file."""
    try:
        text = json.loads(path.read_bytes())
        code, variables = (text["mapping"][part] for part in ("executable", "nvram-template"))
        suits = (
            "uefi" in text["interface-types"]
            and text["mapping"]["device"] == "flash"
            and code["format"] == variables["format"] == "raw"
            and not {"secure-boot", "requires-smm"} & set(text["features"])
            and any(
                target["architecture"] == kind.name
                and any(fnmatch(kind.machine, pattern) for pattern in target["machines"])
                for target in text["targets"]
            )
        )
        pair = (root / str(item["filename"]).lstrip("/") for item in (code, variables))
        return UefiFirmware(*pair) if suits else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


async def make_vars(template: Path, dest: Path) -> None:
    """Make a VM's variable store at dest from a raw template, replacing one that is there.

    It is qcow2: a snapshot of a machine needs every writable drive to be able to hold one.
    Raises MissingDependency without qemu-img, ToolFailed with its words if it fails.
    """
    qemu_img = get_program("qemu-img", package="qemu-utils")
    fresh = dest.with_name(dest.name + ".new")
    try:
        await run_tool(
            [qemu_img, "convert", "-f", "raw", "-O", "qcow2", template, fresh], timeout_s=30
        )
        fresh.replace(dest)
    finally:
        fresh.unlink(missing_ok=True)
