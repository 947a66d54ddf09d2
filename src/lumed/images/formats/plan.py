"""What an image is made of, whatever its format: the plan that a pull follows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from lumed.errors import NotPossibleHere, RegistryFailed
from lumed.images.oci import Descriptor
from lumed.images.qcow2 import MAX_VIRTUAL_BYTES
from lumed.model.vm import Display, GuestOs

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_ARCHITECTURES = {
    "amd64": "amd64",
    "x86_64": "amd64",
    "x86-64": "amd64",
    "x64": "amd64",
    "arm64": "arm64",
    "aarch64": "arm64",
}
_SYSTEMS = {"linux": GuestOs.LINUX, "darwin": GuestOs.MACOS, "macos": GuestOs.MACOS}
_MAX_CPUS = 4096
_MAX_MEMORY_BYTES = 64 << 40


class Compression(StrEnum):
    """How a blob's content is packed. LZ4 is Apple's framing of it, not the standard one."""

    RAW = "raw"
    GZIP = "gzip"
    ZSTD = "zstd"
    LZ4 = "lz4"


@dataclass(frozen=True, slots=True)
class DiskPart:
    """A blob and its place in the disk file; a blob may serve several parts.

    offset None: after the part before. size_bytes is the unpacked length and content_digest its
    sha256, if told. compression None: told by the blob's first bytes.
    """

    blob: Descriptor
    offset: int | None = None
    size_bytes: int | None = None
    content_digest: str | None = None
    compression: Compression | None = None


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """How a disk file is made from blobs, and what the image says about its machine.

    architecture is "amd64", "arm64", or None if unsaid; cpu_count, memory_bytes and display are
    None if unsaid or nonsense. disk_bytes is the size of the disk file, if told. in_tar: the
    parts are tar archives, uppermost first, and the first that holds a file in disk/ has it.
    Whether the file is raw or qcow2 is for the inspection of the result.
    """

    format: str
    os: GuestOs
    parts: tuple[DiskPart, ...]
    architecture: str | None = None
    cpu_count: int | None = None
    memory_bytes: int | None = None
    display: Display | None = None
    disk_bytes: int | None = None
    in_tar: bool = False

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        """The distinct blobs, in the order in which they are first needed."""
        return tuple({part.blob.digest: part.blob for part in self.parts}.values())


def place_parts(
    parts: Iterable[DiskPart], disk_bytes: int | None
) -> tuple[tuple[DiskPart, ...], int | None]:
    """Give each part its offset and size as far as they follow from the others; the disk's size.

    Raises RegistryFailed if the parts leave a gap, overlap, or do not end where the disk does.
    """
    placed = list(parts)
    if not placed:
        raise RegistryFailed("The image has no disk")
    at: int | None = 0
    for index, part in enumerate(placed):
        offset = at if part.offset is None else part.offset
        if at is not None and offset != at:
            raise RegistryFailed(
                f"Part {index + 1} of the image's disk is to be at {offset} and not at {at}, "
                "where the part before ends"
            )
        following = placed[index + 1].offset if index + 1 < len(placed) else disk_bytes
        size = part.size_bytes
        if size is None and offset is not None and following is not None:
            size = following - offset
            if size < 0:
                raise RegistryFailed(f"Part {index + 1} of the image's disk overlaps the next")
        placed[index] = replace(part, offset=offset, size_bytes=size)
        at = None if offset is None or size is None else offset + size
        if at is not None and at > MAX_VIRTUAL_BYTES:
            raise RegistryFailed(f"The image claims a disk of {at} bytes; at most 64 TB are taken")
    if disk_bytes is not None and at is not None and at != disk_bytes:
        raise RegistryFailed(
            f"The parts of the image's disk have {at} bytes together and should have {disk_bytes}"
        )
    return tuple(placed), at if disk_bytes is None else disk_bytes


def sort_parts(
    layers: Iterable[Descriptor],
    number_of: Callable[[Descriptor], int | None],
    total_of: Callable[[Descriptor], int | None],
    *,
    first: int,
) -> list[Descriptor]:
    """The layers by their part numbers, which count from `first`.

    Raises RegistryFailed if a part is missing, there twice, or without a number.
    """
    layers = list(layers)
    numbers = [number_of(layer) for layer in layers]
    if len(layers) == 1 and numbers == [None]:
        return layers
    total = max([len(layers), *(told for told in map(total_of, layers) if told is not None)])
    seen = dict(zip(numbers, layers, strict=True))
    missing = [number for number in range(first, first + min(total, 100_000)) if number not in seen]
    if missing or len(seen) != len(layers):
        which = f"part {missing[0]}" if missing else "a part twice"
        raise RegistryFailed(
            f"The image's disk has {total} parts, and its manifest lists "
            f"{'not ' * bool(missing)}{which}"
        )
    return [seen[number] for number in range(first, first + total)]


def parse_count(text: object) -> int | None:
    """A size or number as annotations have it, "123"; None if absent. Raises RegistryFailed."""
    if text is None:
        return None
    if isinstance(text, str) and re.fullmatch(r"[0-9]{1,20}", text):
        return int(text)
    raise RegistryFailed(f"The image's manifest has {text!r:.60} where a number should be")


def parse_content_digest(text: str | None) -> str | None:
    """The digest of unpacked content; None if absent or of another kind than sha256."""
    if text is None or not _DIGEST.fullmatch(text):
        return None
    return text


def parse_config(config: bytes) -> Mapping[str, Any]:
    """The JSON object of a config blob; empty for anything else, since all of it is optional."""
    try:
        value = json.loads(config)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def parse_os(value: object) -> GuestOs:
    """The guest's system, Linux if unsaid. Raises NotPossibleHere for others than two."""
    if value is None or value == "":
        return GuestOs.LINUX
    found = _SYSTEMS.get(value.lower()) if isinstance(value, str) else None
    if found is None:
        raise NotPossibleHere(
            f"The image holds a guest of {value!r:.60}; Linux and macOS are known"
        )
    return found


def parse_architecture(value: object) -> str | None:
    """OCI's word for a processor, "amd64" or "arm64"; None for the unsaid and unknown."""
    return _ARCHITECTURES.get(value.lower()) if isinstance(value, str) else None


def parse_cpu_count(value: object) -> int | None:
    """A number of processors, from a JSON number or a text; None if it is none."""
    return _parse_lenient(value, _MAX_CPUS)


def parse_memory(value: object, unit: int = 1) -> int | None:
    """A memory size in bytes, from a number or text that counts `unit`s; None if it is none."""
    number = _parse_lenient(value, _MAX_MEMORY_BYTES // unit)
    return None if number is None else number * unit


def parse_display(value: object) -> Display | None:
    """A display from "1024x768"; None if it is none."""
    try:
        return Display.parse(value)
    except ValueError:
        return None


def _parse_lenient(value: object, most: int) -> int | None:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,20}", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
        return None
    return value
