"""`lume` commands as processes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.system.harness import LUME


@dataclass(frozen=True)
class Lume:
    """Runs commands for one home."""

    home: Path
    env: Mapping[str, str] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """What a command's process is given."""
        return {**os.environ, "LUME_HOME": str(self.home), **self.env}

    def __call__(self, *arguments: str, status: int = 0, timeout_s: float = 120) -> str:
        """stdout of a command that ends with that status, and never with a traceback."""
        return self.run(*arguments, status=status, timeout_s=timeout_s).stdout

    def run(
        self, *arguments: str, status: int = 0, timeout_s: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """The same, with stderr."""
        ended = subprocess.run(
            [*LUME, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
        )
        assert "Traceback" not in ended.stderr, ended.stderr
        assert ended.returncode == status, (ended.stdout, ended.stderr)
        return ended

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """A command that goes on."""
        # Ctrl-C reaches it also where the tests themselves were started to ignore it (nohup).
        return subprocess.Popen(
            ["env", "--default-signal=INT", *LUME, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment(),
        )
