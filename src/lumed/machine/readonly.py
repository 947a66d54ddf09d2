"""A script: run a program that sees one directory, with all that is mounted below, read-only.

    python -I -S readonly.py DIRECTORY PROGRAM [ARGUMENT …]

It needs CAP_SYS_ADMIN, of a user namespace if need be. The directory is bound onto itself in a
mount namespace of its own and made read-only by mount_setattr(2) (Linux 5.12), which covers
mounts below it in one step. Nothing of it is seen outside. util-linux can do the same from
version 2.39 on only (Debian 12 has 2.38), and Python's os.unshare came with 3.12.
"""

from __future__ import annotations

import ctypes
import os
import sys

_CLONE_NEWNS = 0x00020000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
_SYS_MOUNT_SETATTR = 442  # the same number on every architecture
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_ATTR_RDONLY = 0x1


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def make_read_only(directory: bytes) -> None:
    """Leave the mount namespace and make the directory read-only in the new one.

    Raises OSError that names the step.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def check(step: str, result: int) -> None:
        if result != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{step}: {os.strerror(number)}")

    check("unshare", libc.unshare(_CLONE_NEWNS))
    check("private", libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None))
    flags = ctypes.c_ulong(_MS_BIND | _MS_REC)
    check("bind", libc.mount(directory, directory, None, flags, None))
    wanted = _MountAttr(attr_set=_MOUNT_ATTR_RDONLY)
    result = libc.syscall(
        ctypes.c_long(_SYS_MOUNT_SETATTR),
        ctypes.c_int(_AT_FDCWD),
        directory,
        ctypes.c_uint(_AT_RECURSIVE),
        ctypes.byref(wanted),
        ctypes.c_size_t(ctypes.sizeof(wanted)),
    )
    check("mount_setattr", result)


if __name__ == "__main__":
    make_read_only(os.fsencode(sys.argv[1]))
    # Python opened nothing that stays: its own descriptors are closed on exec.
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606
