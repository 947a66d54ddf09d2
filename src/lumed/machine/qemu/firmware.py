"""UEFI firmware (OVMF): where this host has it, and each VM's own variable store.

SeaBIOS needs none of this: QEMU brings it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from lumed.errors import MissingDependency
from lumed.osproc import get_program, run_tool

# Builds without Secure Boot: those with it need SMM, and refuse unsigned rescue systems. The
# 4 MB builds come first, since distributions are dropping the 2 MB ones.
_KNOWN = (
    ("usr/share/OVMF/OVMF_CODE_4M.fd", "usr/share/OVMF/OVMF_VARS_4M.fd"),  # Debian, Ubuntu
    ("usr/share/edk2/x64/OVMF_CODE.4m.fd", "usr/share/edk2/x64/OVMF_VARS.4m.fd"),  # Arch
    ("usr/share/edk2/ovmf/OVMF_CODE.fd", "usr/share/edk2/ovmf/OVMF_VARS.fd"),  # Fedora
    ("usr/share/OVMF/OVMF_CODE.fd", "usr/share/OVMF/OVMF_VARS.fd"),  # older Debian, Ubuntu
)
# What distributions tell programs like this one; docs/interop/firmware.json in QEMU's source.
_DESCRIPTORS = ("etc/qemu/firmware", "usr/share/qemu/firmware")
_MACHINE = "pc-q35-7.2"


@dataclass(frozen=True, slots=True)
class UefiFirmware:
    """A matching pair of raw flash images: shared read-only code, and the empty variables."""

    code: Path
    vars_template: Path


def find_uefi(root: Path = Path("/")) -> UefiFirmware:
    """The x86_64 UEFI firmware without Secure Boot on the file system at root.

    Raises MissingDependency if there is none.
    """
    for code, variables in _KNOWN:
        firmware = UefiFirmware(root / code, root / variables)
        if _is_complete(firmware):
            return firmware
    for folder in _DESCRIPTORS:
        for descriptor in sorted((root / folder).glob("*.json")):
            described = _read_descriptor(descriptor, root)
            if described is not None and _is_complete(described):
                return described
    raise MissingDependency(
        "No UEFI firmware (OVMF) for x86_64 is installed", hint="sudo apt-get install ovmf"
    )


def _is_complete(firmware: UefiFirmware) -> bool:
    return firmware.code.is_file() and firmware.vars_template.is_file()


def _read_descriptor(path: Path, root: Path) -> UefiFirmware | None:
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
                target["architecture"] == "x86_64"
                and any(fnmatch(_MACHINE, pattern) for pattern in target["machines"])
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
