"""An initramfs: the root directory of a small guest, as the archive that a kernel unpacks.

Written here instead of by cpio(1), so that device nodes and root-owned files need no root.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from lumed.errors import ToolFailed
from lumed.osproc import get_program, run_tool_blocking

_MODULE = re.compile(r"(?P<name>[^/]+)\.ko(?P<packed>\.zst|\.xz|\.gz)?")
_UNPACKERS = {".zst": ("zstd", "zstd"), ".xz": ("xz", "xz-utils"), ".gz": ("gzip", "gzip")}
# The .modinfo section is a row of zero-ended "key=value" strings; see modinfo(8).
_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


@dataclass(slots=True)
class Archive:
    """The files of an initramfs by path, without leading slash; parents are added by themselves.

    data() gives the archive in the "newc" format: Documentation/driver-api/early-userspace
    and cpio(5). Equal contents give equal bytes: no times, no inode numbers of this host.
    """

    _entries: dict[str, tuple[int, bytes, tuple[int, int]]] = field(default_factory=dict)

    def add_file(self, path: str, content: bytes, mode: int = 0o644) -> None:
        self._add(path, stat.S_IFREG | mode, content)

    def add_directory(self, path: str, mode: int = 0o755) -> None:
        self._add(path, stat.S_IFDIR | mode, b"")

    def add_link(self, path: str, target: str) -> None:
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def add_character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        self._add(path, stat.S_IFCHR | mode, b"", (major, minor))

    def __contains__(self, path: str) -> bool:
        return path in self._entries

    def data(self) -> bytes:
        parts: list[bytes] = []
        for number, (path, entry) in enumerate(self._entries.items(), start=1):
            parts += _record(path, number, *entry)
        parts += _record("TRAILER!!!", 0, 0, b"", (0, 0))
        return b"".join(parts)

    def _add(self, path: str, mode: int, content: bytes, device: tuple[int, int] = (0, 0)) -> None:
        # The kernel makes no missing parents, and wants each before what it holds.
        for parent in reversed(PurePosixPath(path).parents):
            if parent.name and str(parent) not in self._entries:
                self._entries[str(parent)] = (stat.S_IFDIR | 0o755, b"", (0, 0))
        self._entries[path] = (mode, content, device)


def _record(
    path: str, inode: int, mode: int, content: bytes, device: tuple[int, int]
) -> Iterator[bytes]:
    name = path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    numbers = (inode, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(name), 0)
    header = b"070701" + b"".join(b"%08X" % number for number in numbers)
    yield header + name
    yield bytes(-(len(header) + len(name)) % 4)
    yield content
    yield bytes(-len(content) % 4)


@dataclass(frozen=True, slots=True)
class Module:
    """A kernel module, unpacked; name is as in /sys/module: with underscores."""

    name: str
    content: bytes


def read_modules(root: Path, wanted: Iterable[str]) -> dict[str, list[Module]]:
    """Each wanted module that lies under `root`, with what it needs, in the order of loading.

    Names may use dashes or underscores. A module that is not there is left out: it is built
    into the kernel, or this kernel does not have it. Raises ToolFailed if one cannot be read.
    """
    files = {
        match["name"].replace("-", "_"): path
        for path in sorted(root.rglob("*.ko*"))
        if (match := _MODULE.fullmatch(path.name))
    }
    seen: dict[str, Module] = {}

    def read(name: str) -> Module:
        if name not in seen:
            seen[name] = Module(name, _unpack(files[name]))
        return seen[name]

    def order(name: str, found: dict[str, Module]) -> dict[str, Module]:
        if name in files and name not in found:
            module = read(name)
            for needed in _find_needed(module):
                order(needed, found)
            found[name] = module
        return found

    orders = {name: order(name.replace("-", "_"), {}) for name in wanted}
    return {name: list(found.values()) for name, found in orders.items() if found}


def _find_needed(module: Module) -> list[str]:
    match = _DEPENDS.search(module.content)
    if match is None:
        raise ToolFailed(f"The kernel module {module.name} says nothing of what it depends on")
    return [name.decode().replace("-", "_") for name in match[1].split(b",") if name]


def _unpack(path: Path) -> bytes:
    if path.suffix == ".ko":
        return path.read_bytes()
    program, package = _UNPACKERS[path.suffix]
    return run_tool_blocking([get_program(program, package=package), "-dc", path], timeout_s=30)
