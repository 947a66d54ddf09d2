"""virtiofsd, the helper that shares a host directory with a guest: which one, and can it run.

There are two programs of that name: the C one that came with QEMU up to 7.2, and its Rust
successor. They take different options, and only the Rust one runs without root.
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

    def find_obstacle(self, uid: int) -> str | None:
        """Why it cannot run as this user; None if it can.

        Seen with 7.2.22: without root it ends at "setgroups() failed", before its own sandbox.
        In a user namespace with a range of ids it runs: see docs/decisions/0001-qemu-sandbox.md.
        """
        if self.flavour is VirtiofsdFlavour.C and uid != 0:
            return "the C virtiofsd needs root"
        return None


async def find_virtiofsd(places: tuple[str, ...] = _PLACES) -> Virtiofsd | None:
    """The first virtiofsd at the usual places, None if there is none.

    Raises ToolFailed if it does not say its version, TimedOut if it hangs.
    """
    for place in places:
        if os.access(place, os.X_OK):
            return await _read(Path(place))
    return None


async def _read(path: Path) -> Virtiofsd:
    # "virtiofsd version 7.2.22 (Debian ...)\nCopyright ..." from C, "virtiofsd 1.10.0" from Rust.
    text = (await run_tool([path, "--version"], timeout_s=10)).decode(errors="replace")
    found = re.search(r"virtiofsd (version )?v?(\d+(?:\.\d+)+)", text)
    if found is None:
        raise ToolFailed(f"{path} did not say its version: {text.strip()[:200] or 'no output'}")
    return Virtiofsd(path, VirtiofsdFlavour.C if found[1] else VirtiofsdFlavour.RUST, found[2])
