"""Which accelerator QEMU shall use: KVM where it truly runs guests, software emulation elsewhere.

`-accel kvm:tcg` does not decide this: it falls back when KVM cannot be opened, and not when
guests hang under it. So a small 64-bit program is run under KVM once per boot, with limits.
"""

from __future__ import annotations

import asyncio
import errno
import grp
import json
import os
import platform
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from lumed.claim import take_lock
from lumed.errors import InvalidField, MissingDependency, ToolFailed
from lumed.machine.qemu.longmode import CLOCK_LIMIT_S, run_longmode
from lumed.model.host import Accelerator
from lumed.model.vm import Architecture
from lumed.osproc import boot_id, run_tool_blocking

KVM_DEVICE = Path("/dev/kvm")
_ARGS = {
    "kvm": ["-accel", "kvm", "-cpu", "host"],
    "tcg": ["-accel", "tcg,thread=multi", "-cpu", "max"],
}
# Not `max` for arm64: pointer authentication more than doubles the time of its boot. Without that
# (pauth-impdef=on) it still takes 8.0 s of processor time where this one takes 7.1 s.
_EMULATED_ARM64 = ["-accel", "tcg,thread=multi", "-cpu", "cortex-a72"]
_NO_KVM_HINT = (
    "enable hardware virtualisation (VT-x or AMD-V) in this machine's firmware settings, or "
    "nested virtualisation for it if it is a virtual machine itself; then run "
    "`sudo modprobe kvm_intel` or `sudo modprobe kvm_amd`"
)
_BROKEN_KVM_HINT = (
    "if this host is a virtual machine, it needs nested hardware virtualisation; "
    "LUME_ACCEL=kvm uses KVM all the same"
)


def accel_args(accelerator: Accelerator, architecture: Architecture) -> list[str]:
    """The -accel and -cpu arguments; for amd64 the same ones the test program ran with."""
    if architecture is Architecture.ARM64:
        return list(_EMULATED_ARM64)
    return list(_ARGS[accelerator.name])


async def find_accelerator(
    cache_dir: Path, qemu: Path, *, override: str | None = None
) -> Accelerator:
    """Choose KVM if real 64-bit code runs under it, TCG otherwise.

    The verdict on KVM is kept in cache_dir/accel.json until the next boot or another QEMU
    binary; a kept verdict takes well under 1 ms, the first one 0.1 to 6 s. `override` is taken
    as it is, except that KVM never runs another processor's guests. Raises InvalidField for an
    override that is neither "kvm" nor "tcg", MissingDependency if qemu does not exist.
    """
    if override is not None:
        if override not in _ARGS:
            reason = f"must be kvm or tcg, not {override!r}"
            raise InvalidField(f"The accelerator {reason}", fields={"accel": reason})
        if (foreign := _find_foreign(qemu)) is not None:
            return foreign
        return Accelerator(override, "chosen in the settings or by LUME_ACCEL")
    return await asyncio.to_thread(_find, cache_dir, qemu)


async def read_qemu_version(qemu: Path) -> str:
    """The version of a QEMU binary, such as "7.2.22"; asked once per modification time.

    Raises ToolFailed if the program does not say one, MissingDependency if it is missing.
    """
    return await asyncio.to_thread(lambda: _version(qemu, _look_at(qemu).st_mtime_ns))


@lru_cache(maxsize=8)
def _version(qemu: Path, _mtime_ns: int) -> str:
    text = run_tool_blocking([qemu, "--version"], timeout_s=10).decode(errors="replace")
    found = re.search(r"version (\d+\.\d+\.\d+)", text)
    if found is None:
        raise ToolFailed(f"{qemu} did not say its version: {text.strip()[:200] or 'no output'}")
    return found[1]


def _find(cache_dir: Path, qemu: Path) -> Accelerator:
    obstacle = find_obstacle(qemu, KVM_DEVICE)
    if obstacle is not None:
        return obstacle
    cache = cache_dir / "accel.json"
    key = _key(qemu)
    kept = _read_cache(cache, key)
    if kept is not None:
        return kept
    cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _alone(cache_dir / "accel.lock"):
        # Whoever held the lock has probably answered our question.
        kept = _read_cache(cache, key)
        if kept is not None:
            return kept
        verdict = _try_kvm(qemu)
        # Without the file the next caller asks again: no reason to fail this one.
        with suppress(OSError):
            _write_cache(cache, key, verdict)
        return verdict


def _try_kvm(qemu: Path) -> Accelerator:
    run = run_longmode(qemu, _ARGS["kvm"])
    reason = f"a 64-bit test program under KVM {run.finding}"
    return Accelerator("kvm", reason) if run.ok else Accelerator("tcg", reason, _BROKEN_KVM_HINT)


def find_obstacle(qemu: Path, device: Path) -> Accelerator | None:
    """TCG with the reason if KVM is out of the question before anything is run; None if not."""
    if (foreign := _find_foreign(qemu)) is not None:
        return foreign
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        # A device node without its module fails with ENODEV or ENXIO.
        words = os.strerror(error.errno or 0).lower()
        denied = error.errno in (errno.EACCES, errno.EPERM)
        hint = _permission_hint(device) if denied else _NO_KVM_HINT
        return Accelerator("tcg", f"{device}: {words}", hint)
    return None


def _find_foreign(qemu: Path) -> Accelerator | None:
    host = platform.machine()
    if qemu.name.startswith("qemu-system-") and qemu.name != f"qemu-system-{host}":
        return Accelerator("tcg", f"{qemu.name} runs guests of another kind than this {host} host")
    return None


def _permission_hint(device: Path) -> str:
    facts = device.stat()
    with suppress(KeyError):
        group = grp.getgrgid(facts.st_gid).gr_name
        if group != "root" and stat.S_IMODE(facts.st_mode) & 0o060 == 0o060:
            return f"sudo usermod -aG {group} $USER, then log in again"
    return f"sudo setfacl -m u:$USER:rw {device}"


def _key(qemu: Path) -> dict[str, object]:
    """What the verdict depends on. Another QEMU version is another binary with another time.

    The device's change time is there because a module that is loaded again makes it anew.
    """
    facts = _look_at(qemu)
    return {
        "boot_id": boot_id(),
        "qemu": str(qemu),
        "qemu_mtime_ns": facts.st_mtime_ns,
        "qemu_size_bytes": facts.st_size,
        "kvm_ctime_ns": KVM_DEVICE.stat().st_ctime_ns,
    }


def _look_at(qemu: Path) -> os.stat_result:
    try:
        return qemu.stat()
    except FileNotFoundError as error:
        hint = "sudo apt-get install qemu-system-x86"
        raise MissingDependency(f"{qemu} is not there", hint=hint) from error


def _read_cache(path: Path, key: dict[str, object]) -> Accelerator | None:
    """The kept verdict; None if there is none, it is damaged, or belongs to another key."""
    try:
        kept = json.loads(path.read_bytes())
        if kept["key"] != key or kept["name"] not in _ARGS or not isinstance(kept["reason"], str):
            return None
        hint = kept["hint"]
        return Accelerator(kept["name"], kept["reason"], hint if isinstance(hint, str) else None)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_cache(path: Path, key: dict[str, object], verdict: Accelerator) -> None:
    """Replace the file at once. No fsync: after a power cut the boot id differs anyway."""
    text = {"key": key, "name": verdict.name, "reason": verdict.reason, "hint": verdict.hint}
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(text, indent=1) + "\n")
    fresh.replace(path)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock on path, so that one probe runs at a time on this home.

    A holder that takes longer than any probe is stuck (or stopped): its lock is then ignored,
    since two probes at once do no harm.
    """
    deadline = time.monotonic() + CLOCK_LIMIT_S + 1
    while (lock := take_lock(path)) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    try:
        yield
    finally:
        if lock is not None:
            lock.close()
