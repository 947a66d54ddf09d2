"""Commands in a terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time

from tests.cli.lume import Lume
from tests.system.harness import LUME


def run_in_terminal(lume: Lume, *arguments: str, columns: int = 80) -> str:
    """What a command writes to a terminal of that width."""
    master, slave = pty.openpty()
    env = {**lume.environment(), "COLUMNS": str(columns), "TERM": "xterm"}
    with subprocess.Popen([*LUME, *arguments], stdin=slave, stdout=slave, stderr=slave, env=env):
        os.close(slave)
        seen = b""
        give_up_at = time.monotonic() + 60
        try:
            while True:
                ready, _, _ = select.select([master], [], [], give_up_at - time.monotonic())
                assert ready, seen
                try:
                    chunk = os.read(master, 65536)
                except OSError:  # EIO: the other end is closed
                    break
                if not chunk:
                    break
                seen += chunk
        finally:
            os.close(master)
    return seen.decode(errors="replace").replace("\r\n", "\n")
