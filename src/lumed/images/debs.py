"""Debian packages as a source of files: fetched and unpacked without root, nothing installed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from lumed.errors import LumedError, MissingDependency, ToolFailed
from lumed.osproc import get_program, run_tool_blocking

_UPDATE = "sudo apt-get update"
_DEPENDS = re.compile(r"^ *\|?Depends: (linux-image-\S+)$", re.MULTILINE)

# The packages that follow the newest kernel for virtual machines: Debian's, then Ubuntu's.
_KERNELS = {"amd64": ("linux-image-cloud-amd64", "linux-image-virtual")}


def find_kernel_packages(architecture: str) -> list[str]:
    """The packages that hold the newest small kernel and its modules.

    Debian has both in one package, Ubuntu the modules apart. Raises MissingDependency if apt
    knows none (its lists are fetched first by `apt-get update`).
    """
    _get_apt("apt-cache")
    words = "no answer"
    for name in _KERNELS[architecture]:
        try:
            answer = run_tool_blocking(["apt-cache", "depends", "--important", name], timeout_s=60)
        except ToolFailed as error:
            words = error.message  # for a name that apt does not know, too
            continue
        if match := _DEPENDS.search(answer.decode()):
            kernel = match[1]
            if name == "linux-image-virtual":
                return [kernel, kernel.replace("linux-image-", "linux-modules-", 1)]
            return [kernel]
    raise MissingDependency(
        f"apt offers no kernel for {architecture}, {' or '.join(_KERNELS[architecture])}: {words}",
        hint=_UPDATE,
    )


def fetch_packages(names: Iterable[str], directory: Path) -> list[Path]:
    """Download packages into `directory`, in the version that apt would install; sorted paths.

    Raises MissingDependency if there is no apt, ToolFailed if apt does not know a package or
    cannot fetch it: mostly since its lists are older than the archive.
    """
    _get_apt("apt-get")
    try:
        run_tool_blocking(["apt-get", "-qq", "download", *names], timeout_s=600, cwd=directory)
    except LumedError as error:
        error.hint = _UPDATE
        raise
    return sorted(directory.glob("*.deb"))


def unpack_packages(packages: Iterable[Path], root: Path) -> None:
    """Lay the packages' files under `root`, owned by the caller; no package script runs."""
    program = get_program("dpkg-deb", package="dpkg")
    for package in packages:
        run_tool_blocking([program, "-x", package, root], timeout_s=120)


def _get_apt(name: str) -> None:
    if shutil.which(name) is None:
        raise MissingDependency(
            f"The built-in image is made from Debian packages, and {name} is not installed",
            hint="build it on Debian or Ubuntu and copy it, or use another image",
        )
