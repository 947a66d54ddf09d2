"""Sizes as people and clients write them, 1024-based."""

from __future__ import annotations

import re

from lumed.errors import InvalidField

KIB, MIB, GIB, TIB = (1024**n for n in (1, 2, 3, 4))

_UNITS = {"B": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB}
_SIZE = re.compile(r"\s*(\d{1,20})(?:\.(\d{1,20}))?\s*(?:([KMGT])(?:I?B)?|(B))?\s*", re.IGNORECASE)


def parse_size(value: object, field: str) -> int:
    """Bytes of a size: "64GB", "1.5g", "512MiB", "4" (bare: GB) or a JSON number (bytes).

    Raises InvalidField that names `field`. Zero and negative sizes are refused here, since no
    field has a use for them.
    """
    if isinstance(value, bool):
        size = None
    elif isinstance(value, int):
        size = value
    elif isinstance(value, float):
        size = int(value) if value.is_integer() else None
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        whole, decimals, unit, plain = match.groups(default="")
        factor = 1 if plain else _UNITS[(unit or "G").upper()]
        size = int(whole + decimals) * factor // 10 ** len(decimals)
    else:
        size = None
    if size is None or size <= 0:
        reason = f"{value!r:.60} is not a size; write a number and KB, MB, GB or TB, such as 4GB"
        raise InvalidField(f"{field}: {reason}", fields={field: reason})
    return size


def format_size(size_bytes: int) -> str:
    """The exact size in the largest unit that divides it: 4294967296 is "4GB"."""
    for unit, factor in (("TB", TIB), ("GB", GIB), ("MB", MIB), ("KB", KIB)):
        if size_bytes and size_bytes % factor == 0:
            # 1 TB is written as 1024GB: the document counts disks in GB throughout.
            return f"{size_bytes // GIB}GB" if unit == "TB" else f"{size_bytes // factor}{unit}"
    return f"{size_bytes}B"


def describe_size(size_bytes: int) -> str:
    """A size rounded for people, for messages: "3.1 GB"."""
    for unit, factor in (("TB", TIB), ("GB", GIB), ("MB", MIB), ("KB", KIB)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes} B"
