"""The disk in a container disk's layer: a tar archive from a stranger, read as a stream.

Nothing is ever written under a name of the archive; names only choose which content is the disk.
POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header"; GNU tar's long names.
"""

from __future__ import annotations

import re
import tarfile
from dataclasses import dataclass

from lumed.images.decode import BadData, Decoder
from lumed.images.qcow2 import MAX_VIRTUAL_BYTES

_BLOCK = tarfile.BLOCKSIZE
_MAX_HEADER_BYTES = 1 << 20  # a pax header or a long name
_MAX_PADDING_BYTES = 16 << 20  # GNU tar pads to 10 KiB; nobody needs more
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_SKIP_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    kind: bytes
    size_bytes: int
    is_sparse: bool


class TarDisk:
    """The one file in disk/ of an archive: find() it, read it, then check_rest().

    All raise BadData for an archive that cannot be read or is not as it should be.
    """

    def __init__(self, stream: Decoder) -> None:
        self._stream = stream
        self._left = 0
        self._padding = 0

    def find(self) -> int | None:
        """Go to the next file in disk/; its size, or None if there is none."""
        while (member := self._next_member()) is not None:
            self._left = member.size_bytes
            self._padding = -member.size_bytes % _BLOCK
            if self._is_disk(member):
                return member.size_bytes
        return None

    def readinto(self, buffer: memoryview, /) -> int:
        """Content of the file that find() found; 0 at its end."""
        view = buffer[: self._left]
        if not view:
            return 0
        count = self._stream.readinto(view)
        if count == 0:
            raise BadData("its tar archive is cut off")
        self._left -= count
        return count

    def take_zeros(self, limit: int) -> int:
        """Zeros of the file that come next; see Decoder."""
        count = self._stream.take_zeros(min(limit, self._left))
        self._left -= count
        return count

    def check_rest(self) -> None:
        """Read to the end: there must be no second disk, and nothing behind the archive."""
        if self.find() is not None:
            raise BadData("it holds more than one file in disk/")
        scratch = memoryview(bytearray(_SKIP_BYTES))
        padding = 0
        while count := self._stream.readinto(scratch):
            padding += count
            if padding > _MAX_PADDING_BYTES:
                raise BadData("its tar archive goes on after its end")

    def _is_disk(self, member: _Member) -> bool:
        steps = [step for step in member.name.split("/") if step not in ("", ".")]
        if member.name.startswith("/") or ".." in steps:
            raise BadData(f"its tar archive has a file with the path {member.name!r:.120}")
        if len(steps) != 2 or steps[0] != "disk" or steps[1].startswith(".wh."):
            if steps == ["disk"] and member.kind != tarfile.DIRTYPE:
                raise BadData("its disk/ is no directory")
            return False
        if member.kind == tarfile.DIRTYPE:
            return False
        if member.kind not in _FILES or member.is_sparse:
            raise BadData(f"its {member.name!r:.120} is no plain file")
        return True

    def _next_member(self) -> _Member | None:
        """The next header with what the headers before it say; None at the archive's end."""
        self._skip(self._left + self._padding)
        self._left = self._padding = 0
        name: str | None = None
        size: int | None = None
        is_sparse = False
        while True:
            block = self._read(_BLOCK, may_end=True)
            if not block or not any(block):
                return None
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                raise BadData(f"its tar archive is damaged: {error}") from error
            if header.size < 0 or header.size > MAX_VIRTUAL_BYTES:
                raise BadData(f"its tar archive has a file of {header.size} bytes")
            if header.type == tarfile.GNUTYPE_LONGNAME:
                text = self._read_extra(header.size).partition(b"\0")[0]
                name = text.decode("utf-8", "surrogateescape")
            elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                records = _parse_pax(self._read_extra(header.size))
                name = records.get("path", name)
                size = _parse_size(records["size"]) if "size" in records else size
                is_sparse = any(key.startswith("GNU.sparse.") for key in records)
            elif header.type in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
                self._read_extra(header.size)
            else:
                return _Member(
                    name=header.name if name is None else name,
                    kind=header.type,
                    size_bytes=_count_content(header) if size is None else size,
                    is_sparse=is_sparse,
                )

    def _read_extra(self, size: int) -> bytes:
        if size > _MAX_HEADER_BYTES:
            raise BadData(f"its tar archive has a header of {size} bytes")
        return self._read(size + -size % _BLOCK)[:size]

    def _read(self, size: int, *, may_end: bool = False) -> bytes:
        data = bytearray(size)
        at = 0
        while at < size:
            count = self._stream.readinto(memoryview(data)[at:])
            if count == 0:
                if at == 0 and may_end:
                    return b""
                raise BadData("its tar archive is cut off")
            at += count
        return bytes(data)

    def _skip(self, size: int) -> None:
        scratch = memoryview(bytearray(min(size, _SKIP_BYTES)))
        while size:
            count = self._stream.readinto(scratch[:size])
            if count == 0:
                raise BadData("its tar archive is cut off")
            size -= count


def _count_content(header: tarfile.TarInfo) -> int:
    """The bytes that follow a header; links and the like have none, whatever their size says."""
    has_none = header.islnk() or header.issym() or header.isdev() or header.isdir()
    return 0 if has_none else header.size


def _parse_pax(data: bytes) -> dict[str, str]:
    """The records of a pax header: "<length> <key>=<value>\\n", the length counting itself."""
    records = {}
    while data:
        match = re.match(rb"(\d{1,7}) ([^=]+)=", data)
        if match is None or not match.end() < int(match[1]) <= len(data):
            raise BadData("its tar archive has a damaged pax header")
        value = data[match.end() : int(match[1]) - 1]
        records[match[2].decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        data = data[int(match[1]) :]
    return records


def _parse_size(text: str) -> int:
    if not re.fullmatch(r"\d{1,15}", text) or int(text) > MAX_VIRTUAL_BYTES:
        raise BadData(f"its tar archive has a file of {text!r:.40} bytes")
    return int(text)
