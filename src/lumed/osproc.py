"""Programs: run one to its end, start one that outlives us, tell a process from a reused pid.

asyncio's subprocess transport kills its child when it is closed, so nothing here uses it: a
machine must survive its server.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from lumed.errors import MissingDependency, TimedOut, ToolFailed
from lumed.threads import Stopped, run_to_end

_LAST_WORDS = 2000
_STOP_LOOK_S = 0.2


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process that cannot be confused with a later one of the same pid.

    start_ticks is field 22 of /proc/PID/stat (proc(5)), in clock ticks since boot.
    """

    boot_id: str
    pid: int
    start_ticks: int


@cache
def boot_id() -> str:
    """The kernel's id of this boot (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass(frozen=True, slots=True)
class ProcessUsage:
    """What a process has used: seconds of all processors, bytes of memory that it holds now."""

    cpu_seconds: float
    memory_bytes: int


def find_process(pid: int) -> ProcessId | None:
    """The identity of a living process; None if it is gone or a zombie."""
    fields = _read_stat(pid)
    return None if fields is None else _identify(pid, fields)


def read_usage(process: ProcessId) -> ProcessUsage | None:
    """What this very process has used; None if it is gone."""
    fields = _read_stat(process.pid)
    if fields is None or _identify(process.pid, fields) != process:
        return None
    ticks = int(fields[11]) + int(fields[12])  # utime, stime
    return ProcessUsage(
        cpu_seconds=ticks / os.sysconf("SC_CLK_TCK"),
        memory_bytes=int(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
    )


def _read_stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat (proc(5)) from the third on; None if it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in brackets and may hold spaces and brackets.
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] in ("Z", "X") else fields


def _identify(pid: int, fields: list[str]) -> ProcessId:
    return ProcessId(boot_id=boot_id(), pid=pid, start_ticks=int(fields[19]))


def is_alive(process: ProcessId) -> bool:
    """Whether this very process still runs (a zombie does not)."""
    return process.boot_id == boot_id() and find_process(process.pid) == process


def send_signal(process: ProcessId, number: signal.Signals) -> bool:
    """Signal this very process; False if it is gone. No other process can be hit: see pidfd(2)."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        if not is_alive(process):
            return False
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)
    return True


async def wait_gone(process: ProcessId, timeout_s: float | None) -> bool:
    """Wait until the process has ended; False if timeout_s passed first.

    None waits without end, for supervisors. Works for processes that are no children of ours.
    """
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        if not is_alive(process):
            return True
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        loop.add_reader(fd, _finish, ended)
        try:
            async with asyncio.timeout(timeout_s):
                await ended
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(fd)
        return True
    finally:
        os.close(fd)


def _finish(ended: asyncio.Future[None]) -> None:
    if not ended.done():
        ended.set_result(None)


def get_program(name: str, *, package: str, also: Sequence[str] = ()) -> Path:
    """The absolute path of a program, by PATH and then at the places in `also`.

    Raises MissingDependency whose hint is the line that installs `package`.
    """
    found = shutil.which(name) or next((p for p in also if os.access(p, os.X_OK)), None)
    if found is None:
        raise MissingDependency(f"{name} is not installed", hint=f"sudo apt-get install {package}")
    return Path(found).absolute()


@dataclass(frozen=True, slots=True)
class Limits:
    """Ceilings for a tool that reads data we do not trust (setrlimit(2))."""

    cpu_s: int = 10
    memory_bytes: int = 1 << 30


def run_tool_blocking(
    argv: Sequence[str | Path],
    *,
    timeout_s: float,
    limits: Limits | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
    stop: threading.Event | None = None,
) -> bytes:
    """Run a program to its end and return its standard output.

    Raises ToolFailed with the last words of its standard error, TimedOut after timeout_s (the
    program and its children are then killed), MissingDependency if it does not exist, Stopped
    if it was killed because `stop` was set (looked at every 0.2 s).
    """
    name = Path(argv[0]).name
    try:
        process = subprocess.Popen(
            [os.fspath(part) for part in argv],
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd,
            env=None if env is None else dict(env),
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise MissingDependency(f"{name} is not installed") from error
    if limits is not None:
        # prlimit(2) from outside instead of a preexec function: no Python runs after fork.
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(process.pid, resource.RLIMIT_CPU, (limits.cpu_s, limits.cpu_s))
            resource.prlimit(
                process.pid, resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes)
            )
    try:
        out, err = _communicate(process, stdin, timeout_s, stop)
    except subprocess.TimeoutExpired as error:
        _kill_session(process)
        process.communicate()
        raise TimedOut(f"{name} did not end within {timeout_s:g} s") from error
    except BaseException:
        _kill_session(process)
        process.communicate()  # unlike wait, it also closes the pipes
        raise
    if process.returncode != 0:
        words = err.decode(errors="replace").strip()[-_LAST_WORDS:]
        raise ToolFailed(
            f"{name} failed with status {process.returncode}: {words or 'no message'}",
            fields={"exitStatus": process.returncode},
        )
    return out


def _communicate(
    process: subprocess.Popen[bytes],
    stdin: bytes | None,
    timeout_s: float,
    stop: threading.Event | None,
) -> tuple[bytes, bytes]:
    if stop is None:
        return process.communicate(stdin, timeout=timeout_s)
    give_up_at = time.monotonic() + timeout_s
    while True:
        if stop.is_set():
            raise Stopped
        try:
            # May be repeated, and loses nothing (subprocess, "communicate").
            return process.communicate(stdin, timeout=_STOP_LOOK_S)
        except subprocess.TimeoutExpired:
            if time.monotonic() > give_up_at:
                raise


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


async def run_tool(
    argv: Sequence[str | Path],
    *,
    timeout_s: float,
    limits: Limits | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
) -> bytes:
    """`run_tool_blocking` in a thread, so that the event loop stays free."""
    return await asyncio.to_thread(
        run_tool_blocking,
        argv,
        timeout_s=timeout_s,
        limits=limits,
        cwd=cwd,
        env=env,
        stdin=stdin,
    )


def read_last_words(log: Path) -> str:
    """The end of a program's log, for the message that tells why it failed. Blocking."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LAST_WORDS))
            return file.read().decode(errors="replace").strip()
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class Child:
    """A detached program that this process started and therefore reaps.

    exit_status is done once it has ended: the status, or the negative number of the signal.
    """

    identity: ProcessId
    exit_status: asyncio.Future[int]


async def start_detached(
    argv: Sequence[str | Path],
    *,
    log: Path,
    stdin: int | None = None,
    pass_fds: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
) -> Child:
    """Start a program in its own session, its output appended to `log`; it outlives this process.

    stdin is a descriptor; without one there is nothing to read. pass_fds keep their numbers in the
    child; no other descriptor is inherited.
    Raises MissingDependency if the program does not exist.
    """
    spawn = partial(_spawn, argv, log, stdin, tuple(pass_fds), env)
    pid = await run_to_end(spawn, undo=_kill_and_reap)
    # Nobody else reaps our children, so the pid cannot have been reused yet.
    fd = os.pidfd_open(pid)
    identity = find_process(pid) or ProcessId(boot_id(), pid, 0)
    loop = asyncio.get_running_loop()
    exit_status: asyncio.Future[int] = loop.create_future()

    def reap() -> None:
        loop.remove_reader(fd)
        os.close(fd)
        _, status = os.waitpid(pid, 0)
        if not exit_status.done():
            exit_status.set_result(os.waitstatus_to_exitcode(status))

    loop.add_reader(fd, reap)
    return Child(identity, exit_status)


def _kill_and_reap(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _spawn(
    argv: Sequence[str | Path],
    log: Path,
    stdin: int | None,
    pass_fds: tuple[int, ...],
    env: Mapping[str, str] | None,
) -> int:
    # posix_spawn rather than Popen: a Popen object insists on being waited for, and its
    # pass_fds cost a fork. dup2 of a descriptor onto itself clears close-on-exec in the child
    # only, so a helper that another thread starts meanwhile cannot inherit a VM's lock.
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        return os.posix_spawn(
            os.fspath(argv[0]),
            [os.fspath(part) for part in argv],
            os.environ if env is None else env,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, null if stdin is None else stdin, 0),
                (os.POSIX_SPAWN_DUP2, output, 1),
                (os.POSIX_SPAWN_DUP2, output, 2),
                *((os.POSIX_SPAWN_DUP2, fd, fd) for fd in pass_fds),
            ],
            setsid=True,
            setsigmask=[],
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM],
        )
    except FileNotFoundError as error:
        raise MissingDependency(f"{Path(argv[0]).name} is not installed") from error
    finally:
        os.close(null)
        os.close(output)
