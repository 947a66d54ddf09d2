"""Where everything of a home is; one file that names every other."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from lumed.errors import Refused

# sockaddr_un holds 108 bytes (unix(7)); room for "/<16 hex>/<name>.sock" below the directory.
_LONGEST_RUNTIME_DIR = 108 - 1 - 40


@dataclass(frozen=True, slots=True)
class Home:
    """The paths of one home directory."""

    root: Path

    @property
    def server_lock(self) -> Path:
        """Held while a server lives."""
        return self.root / "server.lock"

    @property
    def server_json(self) -> Path:
        """Where that server listens."""
        return self.root / "server.json"

    @property
    def token(self) -> Path:
        """What the TCP ports ask for, if it is there (mode 0600)."""
        return self.root / "token"

    @property
    def socket(self) -> Path:
        """The server's unix socket, unless it was given another."""
        return self.runtime / "lume.sock"

    @property
    def logs(self) -> Path:
        """The server's own logs."""
        return self.root / "logs"

    @property
    def operations(self) -> Path:
        """One JSON file for each operation."""
        return self.root / "operations"

    @property
    def answers(self) -> Path:
        """Answers to requests that had an Idempotency-Key."""
        return self.root / "answers"

    @property
    def cache(self) -> Path:
        """Images that VMs rest on, unless configured elsewhere."""
        return self.root / "cache"

    @property
    def seen_paths(self) -> Path:
        """Storage paths that requests have named, so that VMs there are found again."""
        return self.root / "paths.json"

    @property
    def ssh_key(self) -> Path:
        """The private key of this home (0600), whose public half every guest is seeded with."""
        return self.root / "ssh" / "id_ed25519"

    @property
    def known_hosts(self) -> Path:
        """The host keys of guests, each under its VM's uuid; `lume ssh` writes it."""
        return self.root / "ssh" / "known_hosts"

    @property
    def runtime(self) -> Path:
        """Sockets. In the home, so that no log-out or cleaner of temporary files takes them.

        A socket's path must stay short; a home that is too deep gets a folder in /tmp.
        """
        inside = self.root / "run"
        if len(os.fsencode(inside)) <= _LONGEST_RUNTIME_DIR:
            return inside
        digest = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:16]
        return Path("/tmp") / f"lumed-{os.getuid()}" / digest  # noqa: S108 - checked below

    def location(self, name: str) -> Path:
        """The folder of a built-in location."""
        return self.root / "vms" if name == "home" else self.root / "storage" / name

    def prepare(self) -> None:
        """Make the home's own folders, private to this user.

        Raises Refused if the runtime folder belongs to somebody else.
        """
        folders = (self.root, self.operations, self.answers, self.logs, self.location("home"))
        for directory in folders:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for directory in (self.runtime.parent, self.runtime):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            status = directory.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                raise Refused(f"{directory} belongs to another user", hint="choose another home")
        self.runtime.chmod(0o700)


def vm_runtime_dir(runtime: Path, uuid: str) -> Path:
    """The folder for the sockets of one VM."""
    return runtime / uuid.replace("-", "")[:16]
