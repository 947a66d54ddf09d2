"""`python -m bench`: measures, prints a table, and says whether every target was met."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from bench.figures import FIGURES
from bench.sampling import Row
from bench.server import Lumed


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser("scripts/bench", description=__doc__)
    parser.add_argument("--runs", type=int, default=10, help="runs of each figure (10)")
    parser.add_argument("--only", nargs="+", choices=FIGURES, help="measure these figures only")
    parser.add_argument("--json", type=Path, help="write all samples to this file too")
    chosen = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="lumed-bench-") as directory:
        # libvirt's guest belongs to another user, who must get through to its own folder.
        Path(directory).chmod(0o711)
        lumed = Lumed(Path(directory))
        for name in chosen.only or FIGURES:
            print(f"==> measuring {name}, load {os.getloadavg()[0]:.1f}", flush=True)
            rows += FIGURES[name](lumed, chosen.runs)
    print(_table(rows))
    if chosen.json is not None:
        text = json.dumps([asdict(row) | {"met": row.met} for row in rows], indent=1)
        chosen.json.write_text(text + "\n")
    return 0 if all(row.met for row in rows) else 1


def _table(rows: list[Row]) -> str:
    head = ("figure", "lumed", "beside it", "judged", "target", "met")
    lines = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cells(row: Row) -> tuple[str, ...]:
    def number(value: float) -> str:
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"

    others = (f"{who} {number(value)}" for who, value in row.measured.items() if who != "lumed")
    return (
        row.figure,
        f"{number(row.measured['lumed'])} {row.unit}".rstrip(),
        ", ".join(others),
        f"{row.judged_as}: {number(row.judged)}",
        f"<= {row.limit:g} {row.unit if row.limit_unit is None else row.limit_unit}".rstrip(),
        "yes" if row.met else "NO",
    )


if __name__ == "__main__":
    sys.exit(main())
