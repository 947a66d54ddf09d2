"""Read a disk's content as the guest sees it, whatever chain of qcow2 files it rests on.

qemu-nbd serves the content on a socket that only this process has. That costs a copy between
two processes, and spares both a raw copy on disk and a second reader of qcow2.
Protocol: the NBD project's doc/proto.md; only what reading needs.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from lumed.errors import ToolFailed
from lumed.osproc import get_program, read_last_words

_START_TIMEOUT_S = 20
_READ_TIMEOUT_S = 120  # a read that waits for a slow device
_END_TIMEOUT_S = 10

_GREETING = struct.Struct(">8s8sH")
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_OPTION_EXPORT_NAME = 1
_OPTION = struct.Struct(">I8sII")
_EXPORT = struct.Struct(">QH")
_REQUEST = struct.Struct(">IHHQQI")
_REQUEST_MAGIC = 0x25609513
_READ = 0
_REPLY = struct.Struct(">IIQ")
_REPLY_MAGIC = 0x67446698

# Socket activation (sd_listen_fds(3)): the listening socket is descriptor 3, LISTEN_PID the
# process itself, which only the process before exec can tell. The arguments are not read as
# shell. The socket comes as standard input: dash knows no descriptors above 9.
_ACTIVATE = 'export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@" 3<&0 0</dev/null'


class DiskReader:
    """The content of a disk that nobody writes to; reads may come from several threads."""

    def __init__(self, size_bytes: int, connections: list[socket.socket]) -> None:
        self.size_bytes = size_bytes
        self._idle: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
        for connection in connections:
            self._idle.put(connection)

    def read(self, offset: int, length: int) -> bytearray:
        """The bytes at offset. Raises ToolFailed if QEMU cannot read them."""
        connection = self._idle.get()
        try:
            connection.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, _READ, offset, offset, length))
            magic, error, handle = _REPLY.unpack(_receive(connection, _REPLY.size))
            if magic != _REPLY_MAGIC or handle != offset:
                raise ToolFailed(f"qemu-nbd sent no answer to a read at byte {offset}")
            if error:
                # The protocol's numbers of errors are those of Linux.
                raise ToolFailed(
                    f"The disk cannot be read at byte {offset}: {os.strerror(error)}",
                    hint="qemu-img check tells what is damaged",
                )
            return _receive(connection, length)
        except OSError as error:
            raise ToolFailed(f"qemu-nbd ended while the disk was read: {error}") from error
        finally:
            self._idle.put(connection)


@contextlib.contextmanager
def open_disk(disk: Path, scratch: Path, connections: int) -> Iterator[DiskReader]:
    """Read a qcow2 disk through so many connections; scratch is a private directory.

    Raises ToolFailed with qemu-nbd's last words if it cannot open the disk.
    """
    program = get_program("qemu-nbd", package="qemu-utils")
    log = scratch / "qemu-nbd.log"
    argv: list[str | Path] = ["/bin/sh", "-c", _ACTIVATE, "sh", program]
    argv += ["--read-only", "--format=qcow2", f"--shared={connections}", disk]
    with contextlib.ExitStack() as opened:
        sockets = [
            opened.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(connections + 1)
        ]
        listener, clients = sockets[0], sockets[1:]
        _connect(listener, clients, scratch)
        with log.open("wb") as output:
            process = subprocess.Popen(
                argv,
                stdin=listener.fileno(),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        # Without --persistent it ends with its last connection: so also when we are killed.
        opened.callback(_wait_end, process)
        for client in clients:
            opened.callback(client.close)
        listener.close()
        try:
            sizes = {_shake_hands(client) for client in clients}
        except OSError as error:
            words = read_last_words(log) or error
            raise ToolFailed(f"qemu-nbd cannot open {disk}: {words}") from error
        yield DiskReader(sizes.pop(), clients)


def _connect(listener: socket.socket, clients: list[socket.socket], scratch: Path) -> None:
    """Connect before the server is there: then it needs no path, and nothing is waited for."""
    # A socket's path is short (unix(7)); by way of the descriptor any directory will do.
    directory = os.open(scratch, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        path = f"/proc/self/fd/{directory}/nbd.sock"
        listener.bind(path)
        listener.listen(len(clients))
        for client in clients:
            client.connect(path)
    finally:
        os.close(directory)
    (scratch / "nbd.sock").unlink()


def _shake_hands(connection: socket.socket) -> int:
    """Ask for the one export; returns the disk's size. Raises OSError."""
    connection.settimeout(_START_TIMEOUT_S)
    hello, options, flags = _GREETING.unpack(_receive(connection, _GREETING.size))
    if hello != b"NBDMAGIC" or options != b"IHAVEOPT" or not flags & _NO_ZEROES:
        raise ConnectionError("no NBD greeting")
    ask = _OPTION.pack(_FIXED_NEWSTYLE | _NO_ZEROES, options, _OPTION_EXPORT_NAME, 0)
    connection.sendall(ask)
    size, _ = _EXPORT.unpack(_receive(connection, _EXPORT.size))
    connection.settimeout(_READ_TIMEOUT_S)
    return int(size)


def _receive(connection: socket.socket, length: int) -> bytearray:
    buffer = bytearray(length)
    rest = memoryview(buffer)
    while rest:
        count = connection.recv_into(rest)
        if count == 0:
            raise ConnectionError("the connection was closed")
        rest = rest[count:]
    return buffer


def _wait_end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
