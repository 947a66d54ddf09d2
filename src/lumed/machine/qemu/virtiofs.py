"""virtiofsd, the helper that shares a host directory with a guest: which one is installed.

There are two programs of that name: the C one that came with QEMU up to 7.2, and its Rust
successor. They take different options. Whether it can run here: see machine/shares.py.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from lumed.errors import ToolFailed
from lumed.osproc import run_tool

# Never in PATH. The Rust one's places first: where both are installed it is the better one.
_PLACES = (
    "/usr/libexec/virtiofsd",  # Debian 13, Ubuntu 24.04, Fedora
    "/usr/lib/virtiofsd",  # Arch
    "/usr/lib/qemu/virtiofsd",  # Debian 12 and Ubuntu 22.04 (the C one)
)


class VirtiofsdFlavour(StrEnum):
    """Which program it is, hence which options it takes."""

    C = "C"
    RUST = "Rust"


@dataclass(frozen=True, slots=True)
class Virtiofsd:
    """An installed virtiofsd."""

    path: Path
    flavour: VirtiofsdFlavour
    version: str


async def find_virtiofsd(
    places: tuple[str, ...] = _PLACES, *, prefix: tuple[str, ...] = ()
) -> Virtiofsd | None:
    """The first virtiofsd at the usual places, None if there is none.

    prefix goes before its command: the C one gives up its groups before it reads its options,
    so that without root it cannot even say its version outside of a user namespace.
    Raises ToolFailed if it does not say its version, TimedOut if it hangs.
    """
    for place in places:
        if os.access(place, os.X_OK):
            return await _read(Path(place), prefix)
    return None


async def _read(path: Path, prefix: tuple[str, ...]) -> Virtiofsd:
    # "virtiofsd version 7.2.22 (Debian ...)\nCopyright ..." from C, "virtiofsd 1.10.0" from Rust.
    text = (await run_tool([*prefix, path, "--version"], timeout_s=10)).decode(errors="replace")
    found = re.search(r"virtiofsd (version )?v?(\d+(?:\.\d+)+)", text)
    if found is None:
        raise ToolFailed(f"{path} did not say its version: {text.strip()[:200] or 'no output'}")
    return Virtiofsd(path, VirtiofsdFlavour.C if found[1] else VirtiofsdFlavour.RUST, found[2])
