"""The choice of accelerator, with real QEMU; scripts named like QEMU stand for a working KVM,
one that spins and one that never answers, whatever this host has."""

import asyncio
import os
import time
from pathlib import Path

import pytest

from lumed.errors import MissingDependency
from lumed.machine.qemu import accel, longmode
from lumed.machine.qemu.accel import find_accelerator, read_qemu_version
from lumed.machine.qemu.longmode import run_longmode
from lumed.osproc import Limits, get_program

QEMU = get_program("qemu-system-x86_64", package="qemu-system-x86")
# Counts its runs, then runs the program under TCG whatever accelerator it is asked for.
WORKING = f"""echo run >> "$0.runs"
for word; do
    case $word in kvm) word=tcg;; host) word=max;; esac
    set -- "$@" "$word"; shift
done
exec {QEMU} "$@"
"""


def make_qemu(folder: Path, script: str) -> Path:
    path = folder / "qemu-system-x86_64"
    path.write_text(f"#!/bin/sh\n{script}")
    path.chmod(0o755)
    return path


def count_runs(qemu: Path) -> int:
    return (qemu.parent / f"{qemu.name}.runs").read_text().count("run")


@pytest.fixture
def openable_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "KVM_DEVICE", Path("/dev/null"))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


@pytest.mark.parametrize("cpu", ["max", "qemu64"])
async def test_the_program_runs_in_software_emulation(cpu: str) -> None:
    run = await asyncio.to_thread(run_longmode, QEMU, ["-accel", "tcg", "-cpu", cpu])
    assert run.ok, run.finding


async def test_a_step_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without its interrupt table, the page fault becomes a triple fault, which resets the machine.
    broken = longmode.PROGRAM.replace(bytes.fromhex("0f011d"), bytes.fromhex("0f0115"))
    assert broken != longmode.PROGRAM
    monkeypatch.setattr(longmode, "PROGRAM", broken)
    run = await asyncio.to_thread(run_longmode, QEMU, ["-accel", "tcg", "-cpu", "max"])
    assert (run.ok, run.finding) == (False, "failed at a page fault: the machine reset")


async def test_kvm_that_interprets_every_instruction_is_seen_through(tmp_path: Path) -> None:
    found = await find_accelerator(tmp_path, QEMU)
    if found.name == "kvm" or not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip(f"this host's KVM is not of that kind: {found.reason}")
    # With a named processor such a KVM starts a guest, where `-cpu host` already fails.
    run = await asyncio.to_thread(run_longmode, QEMU, ["-accel", "kvm", "-cpu", "qemu64"])
    assert not run.ok


@pytest.mark.usefixtures("openable_kvm")
async def test_kvm_that_runs_the_program_is_chosen(tmp_path: Path) -> None:
    found = await find_accelerator(tmp_path / "cache", make_qemu(tmp_path, WORKING))
    assert found.name == "kvm"
    assert found.reason.startswith("a 64-bit test program under KVM ran in ")
    assert found.hint is None


@pytest.mark.usefixtures("openable_kvm")
async def test_kvm_that_spins_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longmode, "_LIMITS", Limits(cpu_s=1, memory_bytes=8 << 30))
    found = await find_accelerator(tmp_path, make_qemu(tmp_path, "while :; do :; done"))
    assert found.name == "tcg"
    assert "processor time" in found.reason
    assert found.hint is not None


@pytest.mark.usefixtures("openable_kvm")
async def test_kvm_that_never_answers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(longmode, "CLOCK_LIMIT_S", 0.3)
    found = await find_accelerator(tmp_path, make_qemu(tmp_path, "exec sleep 60"))
    assert found.name == "tcg"
    assert found.reason.endswith("did not even start: nothing happened for 0.3 s")


@pytest.mark.usefixtures("openable_kvm")
async def test_a_qemu_without_kvm_says_why(tmp_path: Path) -> None:
    script = "echo 'qemu: warning: old' >&2; echo 'invalid accelerator kvm' >&2; exit 1"
    found = await find_accelerator(tmp_path, make_qemu(tmp_path, script))
    assert found.name == "tcg"
    assert found.reason.endswith("did not even start: invalid accelerator kvm")


@pytest.mark.usefixtures("openable_kvm")
async def test_callers_at_once_share_one_probe_and_later_ones_its_verdict(tmp_path: Path) -> None:
    qemu = make_qemu(tmp_path, WORKING)
    found = await asyncio.gather(*(find_accelerator(tmp_path / "cache", qemu) for _ in range(4)))
    assert len(set(found)) == 1
    assert await find_accelerator(tmp_path / "cache", qemu) == found[0]
    assert count_runs(qemu) == 1


@pytest.mark.usefixtures("openable_kvm")
async def test_another_binary_or_a_damaged_file_is_probed_again(tmp_path: Path) -> None:
    qemu = make_qemu(tmp_path, WORKING)
    cache = tmp_path / "cache"
    first = await find_accelerator(cache, qemu)
    os.utime(qemu, ns=(0, 0))
    await find_accelerator(cache, qemu)
    assert count_runs(qemu) == 2
    for damage in ("", "[]", '{"key": {}}', "\0", '{"name": "kvm"}'):
        (cache / "accel.json").write_text(damage)
        assert (await find_accelerator(cache, qemu)).name == first.name
    assert count_runs(qemu) == 7
    assert sorted(path.name for path in cache.iterdir()) == ["accel.json", "accel.lock"]


@pytest.mark.usefixtures("openable_kvm")
async def test_a_missing_qemu_is_a_missing_dependency(tmp_path: Path) -> None:
    with pytest.raises(MissingDependency):
        await find_accelerator(tmp_path, tmp_path / "qemu-system-x86_64")


async def test_the_version_is_asked_once_for_each_modification(tmp_path: Path) -> None:
    qemu = make_qemu(tmp_path, 'echo run >> "$0.runs"; echo "QEMU emulator version 9.1.2 (x)"')
    assert [await read_qemu_version(qemu) for _ in range(3)] == ["9.1.2"] * 3
    assert count_runs(qemu) == 1
    started = time.time_ns()
    os.utime(qemu, ns=(started, started))
    await read_qemu_version(qemu)
    assert count_runs(qemu) == 2
