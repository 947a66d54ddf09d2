"""Host directories in a guest: a virtiofsd process for each, or 9p from QEMU itself.

virtiofs is used wherever virtiofsd can run. Without root it runs as root of a user namespace:
the guest's root is the server's user there, so what it writes belongs to that user, and the
guest's other users are the user's subordinate ids (subuid(5)). 9p needs nothing on the host,
but a guest kernel that has it, which Debian's cloud kernel has not.

A virtiofsd ends with its machine, and so does one whose machine never came to be: the
connection that QEMU gets is made before virtiofsd starts, and when its last holder closes it,
virtiofsd sees the end of it, at whatever moment that happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lumed.errors import InvalidField, LumedError, MissingDependency
from lumed.machine import readonly
from lumed.machine.qemu.virtiofs import Virtiofsd, VirtiofsdFlavour, find_virtiofsd
from lumed.model.run import SharedDirectory, ShareTransport
from lumed.osproc import ProcessId, get_program, run_tool, start_detached

# Lume's own tag, so that a guest that mounts it by hand finds the first share. 29 characters;
# virtiofs allows 36 bytes, QEMU's 9p 32.
FIRST_TAG = "com.apple.virtio-fs.automount"

_PROBE_TIMEOUT_S = 10


@dataclass(frozen=True, slots=True)
class ShareSupport:
    """How directories are shared on this host.

    virtiofsd is None where only 9p works; problem and hint then say why. prefix stands before
    virtiofsd: what puts it into a user namespace, without root.
    """

    virtiofsd: Virtiofsd | None
    prefix: tuple[str, ...] = ()
    problem: str | None = None
    hint: str | None = None

    @property
    def transport(self) -> ShareTransport:
        """The transport of every share."""
        return ShareTransport.NINEP if self.virtiofsd is None else ShareTransport.VIRTIOFS


@dataclass(frozen=True, slots=True)
class ShareDevice:
    """A share that is ready for QEMU.

    QEMU must inherit pass_fds under the same numbers; the caller closes them afterwards (or
    calls close), which also ends the helper if QEMU was never started.
    """

    directory: SharedDirectory
    transport: ShareTransport
    argv: tuple[str, ...]
    needs_shared_memory: bool = False
    pass_fds: tuple[int, ...] = ()
    helper: ProcessId | None = None

    def close(self) -> None:
        """Close our copies of the descriptors. Call it once."""
        for fd in self.pass_fds:
            os.close(fd)


def plan_shares(wanted: Iterable[tuple[Path, bool]]) -> tuple[SharedDirectory, ...]:
    """Give tags to directories, each with its read-only flag: Lume's own, then share-2, …"""
    return tuple(
        SharedDirectory(os.fspath(path), read_only, FIRST_TAG if number == 1 else f"share-{number}")
        for number, (path, read_only) in enumerate(wanted, start=1)
    )


async def find_share_support() -> ShareSupport:
    """Find a virtiofsd and try whether it can run for this user (about 20 ms; keep it)."""
    try:
        prefix = () if os.geteuid() == 0 else await _find_namespace()
        virtiofsd = await find_virtiofsd(prefix=prefix)
    except LumedError as error:
        return ShareSupport(None, problem=error.message, hint=error.hint)
    if virtiofsd is None:
        return ShareSupport(
            None,
            problem="virtiofsd is not installed",
            hint="install virtiofsd (Debian 12 has it in qemu-system-common)",
        )
    return ShareSupport(virtiofsd, prefix)


async def _find_namespace() -> tuple[str, ...]:
    """What to put before a command that must be root of a user namespace.

    All ids of the user are mapped, since virtiofsd gives up its groups (7.2.22 otherwise:
    "setgroups() failed") and takes the ids of guest users.
    Raises MissingDependency if a tool is missing or the host forbids it.
    """
    unshare = get_program("unshare", package="util-linux")
    get_program("newuidmap", package="uidmap")
    words = (os.fspath(unshare), "--user", "--map-root-user", "--map-auto")
    try:
        # A mount namespace shows whether the new root may do anything: AppArmor can forbid it.
        await run_tool([*words, "--mount", "--", "/bin/true"], timeout_s=_PROBE_TIMEOUT_S)
    except LumedError as error:
        raise MissingDependency(
            f"virtiofsd needs root or a user namespace: {error.message}",
            hint="allow user namespaces and give the user ranges in /etc/subuid and /etc/subgid",
        ) from error
    return (*words, "--")


async def start_share(
    directory: SharedDirectory,
    index: int,
    support: ShareSupport,
    *,
    runtime_dir: Path,
    log: Path,
) -> ShareDevice:
    """Make one share ready for a QEMU that is about to start; index tells a VM's shares apart.

    runtime_dir must be private to this user and may be the VM's own; nothing stays in it.
    Raises InvalidField for a path with a line end, MissingDependency if virtiofsd is gone.
    """
    if not directory.host_path.isprintable():
        raise InvalidField(
            f"hostPath {directory.host_path!r} has unprintable characters",
            fields={"hostPath": "has unprintable characters"},
        )
    if support.virtiofsd is None:
        return ShareDevice(directory, ShareTransport.NINEP, _ninep_argv(directory, index))
    path = runtime_dir / f"share-{index}.sock"
    listener, connection = await asyncio.to_thread(_connected_pair, path)
    try:
        program = virtiofsd_argv(support.virtiofsd, directory, listener.fileno())
        argv = [*support.prefix, *program]
        child = await start_detached(argv, log=log, pass_fds=[listener.fileno()])
    except BaseException:
        connection.close()
        raise
    finally:
        listener.close()
    fd = connection.detach()
    return ShareDevice(
        directory,
        ShareTransport.VIRTIOFS,
        (
            *("-chardev", f"socket,id=share{index},fd={fd}"),
            *("-device", f"vhost-user-fs-pci,chardev=share{index},tag={directory.tag}"),
        ),
        needs_shared_memory=True,
        pass_fds=(fd,),
        helper=child.identity,
    )


def virtiofsd_argv(virtiofsd: Virtiofsd, directory: SharedDirectory, fd: int) -> list[str]:
    """The command of a virtiofsd that accepts one connection on the listening socket fd.

    Read-only is a read-only mount that only this process sees (see readonly.py): the kernel
    enforces it with every version, also the C one, which has no such option.
    """
    argv: list[str] = []
    if directory.read_only:
        # -I -S: no site packages, no user settings, 15 ms.
        argv += [sys.executable, "-I", "-S", readonly.__file__, directory.host_path]
    argv += [os.fspath(virtiofsd.path), f"--fd={fd}"]
    if virtiofsd.flavour is VirtiofsdFlavour.RUST:
        return [*argv, f"--shared-dir={directory.host_path}"]
    # The C version's -o takes a list: a comma or a backslash in a path is escaped (libfuse).
    source = directory.host_path.replace("\\", "\\\\").replace(",", "\\,")
    return [*argv, "-o", f"source={source}", "-o", "log_level=warn"]


def _ninep_argv(directory: SharedDirectory, index: int) -> tuple[str, ...]:
    # security_model=none: files belong to QEMU's user, and a chown that fails is no error; as
    # root it is the same as passthrough. multidevs: several file systems below one directory.
    path = directory.host_path.replace(",", ",,")
    read_only = ",readonly=on" if directory.read_only else ""
    return (
        "-fsdev",
        f"local,id=share{index},path={path},security_model=none,multidevs=remap{read_only}",
        "-device",
        f"virtio-9p-pci,fsdev=share{index},mount_tag={directory.tag}",
    )


def _connected_pair(path: Path) -> tuple[socket.socket, socket.socket]:
    """A listening socket with one connection waiting on it, and that connection's other end.

    virtiofsd wants to accept by itself, so a socketpair will not do. The path exists for an
    instant, in a directory that only we can enter: nobody can be first in the queue.
    """
    listener = socket.socket(socket.AF_UNIX)
    connection = socket.socket(socket.AF_UNIX)
    try:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        listener.bind(os.fspath(path))
        listener.listen(1)
        connection.connect(os.fspath(path))
        path.unlink()
    except BaseException:
        listener.close()
        connection.close()
        raise
    return listener, connection
