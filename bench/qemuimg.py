"""What qemu-img can do with a disk, and how long that takes."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

from bench.sampling import ms_since


def read_base(disk: Path) -> Path:
    """The file that a disk rests on."""
    command = ["qemu-img", "info", "--output=json", str(disk)]
    facts = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return Path(facts["full-backing-filename"])


def make_overlay(base: Path, disk: Path, size: str = "1G") -> float:
    """Make an empty disk, durable, that rests on a raw one; the milliseconds."""
    started = time.perf_counter()
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(base)]
    subprocess.run([*command, str(disk), size], check=True)
    fd = os.open(disk, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    return ms_since(started)
