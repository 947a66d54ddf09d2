"""The key pair of this home: guests are seeded with its public half, so no password is needed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from lumed.errors import MissingDependency
from lumed.osproc import get_program, run_tool_blocking

_TIMEOUT_S = 20


def read_or_make_key(private: Path) -> str | None:
    """The public half of the key at `private`, as one authorized_keys line. Blocks.

    Both are made at the first call, beside each other, the private one with mode 0600. None if
    ssh-keygen is missing and there is no key yet. Safe to call from several threads and
    processes at once: all get the same key. The private file is the one truth; the public one
    is made from it again if a power cut came between the two. Raises ToolFailed.
    """
    public = private.with_suffix(".pub")
    try:
        text = public.read_text().strip()
    except FileNotFoundError:
        text = ""
    if text and private.exists():
        return text
    try:
        keygen = get_program("ssh-keygen", package="openssh-client")
    except MissingDependency:
        return None
    private.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".new-", dir=private.parent))
    try:
        if not private.exists():
            fresh = work / "key"
            run_tool_blocking(
                [keygen, "-q", "-t", "ed25519", "-N", "", "-C", "lumed", "-f", fresh],
                timeout_s=_TIMEOUT_S,
            )
            _sync(fresh)
            # A link, since a rename would replace the key of somebody who was faster.
            with contextlib.suppress(FileExistsError):
                os.link(fresh, private)
        derived = run_tool_blocking([keygen, "-y", "-f", private], timeout_s=_TIMEOUT_S)
        new_public = work / "key.pub.new"
        new_public.write_bytes(derived)
        new_public.replace(public)
        return derived.decode().strip()
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
