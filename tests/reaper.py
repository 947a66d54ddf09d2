"""Sweeps after a test session, also one that was killed: `reaper.py MARK FOLDER`.

It waits for the end of its standard input, which is the session's end, then ends every process
that has MARK in its environment, undoes mounts below FOLDER and removes it, removes users that
have MARK as their comment, with their homes, and the network namespaces and bridges of the
session's tests.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path


def list_marked(mark: str) -> list[int]:
    """The pids of living processes with the mark."""
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            if mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def main(mark: str, folder: str) -> None:
    """Wait, then sweep; says on stderr what it had to end."""
    session = mark.partition("=")[2][:6]
    while sys.stdin.buffer.read(4096):
        pass
    give_up_at = time.monotonic() + 10
    while (pids := list_marked(mark)) and time.monotonic() < give_up_at:
        for pid in pids:
            with contextlib.suppress(OSError):
                name = Path(f"/proc/{pid}/comm").read_text().strip()
                os.kill(pid, signal.SIGKILL)
                print(f"reaper: ended {name} ({pid}), left by a test", file=sys.stderr)
        time.sleep(0.05)
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in reversed([m for m in mounts if m.startswith(folder + "/")]):
        subprocess.run(["umount", "-l", mount], check=False)
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        # Where servers of homes with long paths have their sockets, if nothing is left in it.
        Path(f"/tmp/lumed-{os.getuid()}").rmdir()
    for line in subprocess.run(
        ["ip", "netns", "list"], check=False, capture_output=True, text=True
    ).stdout.splitlines():
        if line.startswith(f"lmo{session}x"):
            subprocess.run(["ip", "netns", "delete", line.split()[0]], check=False)
    for link in Path("/sys/class/net").glob(f"lmh{session}x*"):
        subprocess.run(["ip", "link", "delete", link.name], check=False)
    for line in Path("/etc/passwd").read_text().splitlines():
        fields = line.split(":")
        if len(fields) > 4 and fields[4] == mark:
            subprocess.run(["userdel", "-f", "-r", fields[0]], check=False, capture_output=True)
            shutil.rmtree(f"/tmp/lumed-{fields[2]}", ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
