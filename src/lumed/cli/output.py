"""What commands show: data on stdout, talk on stderr, and nothing that drives the terminal."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from lumed.errors import LumedError

T = TypeVar("T")
Format = Literal["text", "json", "yaml"]

_GAP = "  "
# C0 without tab and line feed, DEL, C1, and what turns the direction of text.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True, slots=True)
class Column(Generic[T]):
    """A column of a table; of those that do not fit, the one with the highest rank goes first."""

    title: str
    value: Callable[[T], str]
    rank: int = 0


def clean(text: str) -> str:
    """Text with its control characters written out, so that none reaches a terminal."""
    # Nearly all of it, and quicker told.
    if text.isprintable():
        return text
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


def show(text: str) -> None:
    """A line of data, on stdout."""
    sys.stdout.write(clean(text) + "\n")


def say(text: str) -> None:
    """A line of talk, on stderr."""
    sys.stderr.write(clean(text) + "\n")
    sys.stderr.flush()


def complain(error: LumedError) -> None:
    """A failure and what to do about it, on stderr."""
    say(f"lume: {error.message}")
    if error.hint:
        say(f"  {error.hint}")


def show_data(data: Any, format: Format) -> None:
    """An object of the API as JSON or YAML."""
    if format == "yaml":
        import yaml

        # It writes control characters as escapes by itself.
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=not sys.stdout.isatty())
        sys.stdout.write(text)
    else:
        text = json.dumps(data, indent=2, ensure_ascii=sys.stdout.isatty())
        sys.stdout.write(text + "\n")


def show_table(columns: Sequence[Column[T]], rows: Sequence[T]) -> None:
    """A table that fits the terminal; all of it where stdout is none."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in plan_table(columns, rows, width):
        show(line)


def plan_table(
    columns: Sequence[Column[T]], rows: Sequence[T], width: int | None = None
) -> list[str]:
    """The lines of a table. Columns are left out to fit the width, cells are never cut."""
    cells = [
        [column.title, *(clean(column.value(row)).replace("\n", " ") or "-" for row in rows)]
        for column in columns
    ]
    widths = [max(map(len, column)) for column in cells]
    kept = list(range(len(columns)))
    while width is not None and len(kept) > 1 and _total([widths[i] for i in kept]) > width:
        worst = max(kept, key=lambda index: (columns[index].rank, index))
        if columns[worst].rank == 0:
            break
        kept.remove(worst)
    return [
        _GAP.join(cells[i][row].ljust(widths[i]) for i in kept).rstrip()
        for row in range(len(rows) + 1)
    ]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)
