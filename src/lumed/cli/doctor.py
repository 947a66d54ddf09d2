"""How `lume doctor` shows its findings."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lumed.model.host import Check


def print_checks(checks: Sequence[Check]) -> int:
    """Print a line for each check; 0 if all are well, else 1."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = "ok" if check.ok else "--"
        print(f"{mark}  {check.name:<{width}}  {check.value}", file=sys.stdout)  # noqa: T201
        for line in filter(None, (check.detail, check.hint and f"mend: {check.hint}")):
            print(f"    {'':<{width}}  {line}")  # noqa: T201
    return 0 if all(check.ok for check in checks) else 1
