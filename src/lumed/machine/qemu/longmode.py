"""A tiny 64-bit program that shows whether an accelerator really runs guests.

/dev/kvm that opens, and even a VM that it makes, prove little: under a nested, paravirtual
hypervisor KVM was seen to interpret every guest instruction (half a million a second, so that a
stock kernel seems to hang while it unpacks itself) and to fail at the first ring 3 code. The
program does what every kernel does first, and counts to 20 million on the way.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lumed.errors import TimedOut, ToolFailed
from lumed.osproc import Limits, run_tool_blocking

# A healthy run takes 0.1 s or less of either. The processor time is what tells a guest that
# spins from one that is only waiting for its turn on a busy host; the clock is for one that halts.
CPU_LIMIT_S = 2
CLOCK_LIMIT_S = 6.0
# Address space: QEMU reserves about 1.5 GB for translated code and thread stacks.
_LIMITS = Limits(cpu_s=CPU_LIMIT_S, memory_bytes=8 << 30)

STEPS = {
    "p": "protected mode",
    "l": "paging in 64-bit mode",
    "s": "counting to 20 million",
    "f": "a page fault",
    "t": "a timer interrupt",
    "u": "a system call from user mode",
}

# Assembled from longmode.S, which explains it line by line.
PROGRAM = bytes.fromhex(
    "fa2e660f011628020f20c00c010f22c066ea18000f000800b8100000008ed88ec08ed0bc00800000b070e6e9"
    "c7050000010007100100c7050008010007100100c7050010010007200100c7050810010007300100c7051010"
    "010007400100c7051810010007500100bf00200100b887000000890783c708050000200073f4c70510200100"
    "00000000b8200000000f22e0b8000001000f22d8b9800000c00f320d010100000f300f20c00d000001800f22"
    "c0eab8000f00180048b8c4000f000080ffffffe048bc008000000080ffff31c00fa2b06ce6e9b9002d3101ff"
    "c975fcb073e6e9488d05e0000000bfe0100000e8bc000000488d05e0000000bf00140000e8ab0000000f011d"
    "22010000bb00004000c7035a000000833b5a0f858c000000b066e6e9b0ffe621e6a1bb0000e0fec783f00000"
    "00ff010000c783e003000003000000c7832003000040000000c783800300000000010031edfbf4fa85ed74f9"
    "b074e6e9b9810000c031c0ba180020000f30b9820000c0488d051b0000004889c248c1ea200f30488d0d0900"
    "000041bb02000000480f070f058cc883f818750cb075e6e9baf90c0000b006eefaf4ebfc668907c747021800"
    "008e48c1e8106689470648c1e810894708c3c7042510200100870040004883c40848cfffc5c783b000000000"
    "00000048cf0f1f80000000000000000000000000ffff0000009bcf00ffff00000093cf00ffff0000009baf00"
    "ffff00000093cf00ffff000000f3cf00ffff000000fbaf003700f0010f00ff0f001000000080ffff"
)
_ROM_BYTES = 0x10000
# At the processor's first instruction, 16 bytes before the end: jump far to 0xf000:0000.
_RESET_VECTOR = bytes.fromhex("ea000000f0").ljust(16, b"\0")


@dataclass(frozen=True, slots=True)
class LongmodeRun:
    """How the program fared: `finding` is the rest of a sentence that begins with its name."""

    ok: bool
    finding: str


def run_longmode(qemu: Path, accel_args: Sequence[str]) -> LongmodeRun:
    """Run the program in QEMU with the given -accel and -cpu arguments; blocks up to 6 s.

    Raises MissingDependency if qemu does not exist. Leaves no file: image and output are
    memory files of this process, which QEMU opens through /proc.
    """
    rom = os.memfd_create("longmode")
    trail = os.memfd_create("longmode-trail")
    started = time.monotonic()
    failure: str | None = None
    try:
        os.write(rom, PROGRAM.ljust(_ROM_BYTES - 16, b"\0") + _RESET_VECTOR)
        try:
            run_tool_blocking(
                [
                    qemu,
                    *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
                    *("-machine", "q35", *accel_args, "-m", "32M"),
                    *("-bios", _path_of(rom), "-debugcon", f"file:{_path_of(trail)}"),
                ],
                timeout_s=CLOCK_LIMIT_S,
                limits=_LIMITS,
            )
        except TimedOut:
            failure = f"nothing happened for {CLOCK_LIMIT_S:g} s"
        except ToolFailed as error:
            failure = _explain(error)
        seen = os.pread(trail, len(STEPS) + 1, 0).decode("ascii", errors="replace")
    finally:
        os.close(rom)
        os.close(trail)
    elapsed_ms = round((time.monotonic() - started) * 1000)
    if seen == "".join(STEPS) and failure is None:
        return LongmodeRun(ok=True, finding=f"ran in {elapsed_ms} ms")
    if failure is not None and not seen:
        return LongmodeRun(ok=False, finding=f"did not even start: {failure}")
    step = next((name for letter, name in STEPS.items() if letter not in seen), "the reset")
    return LongmodeRun(ok=False, finding=f"failed at {step}: {failure or 'the machine reset'}")


def _path_of(fd: int) -> str:
    return f"/proc/{os.getpid()}/fd/{fd}"


def _explain(error: ToolFailed) -> str:
    """What ended QEMU: the processor time limit (a signal), or its own first complaint."""
    status, _, words = error.message.partition(": ")
    if status.endswith((" -9", " -24")):
        return f"not done after {CPU_LIMIT_S} s of processor time"
    complaints = [line for line in words.splitlines() if "warning:" not in line]
    return complaints[0] if complaints else status
