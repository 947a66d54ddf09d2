import asyncio
import json
import os
import subprocess
import threading
from pathlib import Path

import pytest

from lumed.errors import ToolFailed
from lumed.machine.qemu.firmware import UefiFirmware, find_uefi, make_vars
from lumed.osproc import get_program

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


async def test_ovmf_boots_from_a_qcow2_variable_store_and_keeps_its_variables(
    tmp_path: Path,
) -> None:
    firmware = find_uefi()
    store = tmp_path / "vars.qcow2"
    await make_vars(firmware.vars_template, store)
    before = read_flash(store)
    assert before == firmware.vars_template.read_bytes()
    await asyncio.to_thread(boot_until, b"UEFI Interactive Shell", firmware, store)
    assert read_flash(store) != before


async def test_an_unreadable_template_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ToolFailed, match="No such file"):
        await make_vars(tmp_path / "missing.fd", tmp_path / "vars.qcow2")
    assert list(tmp_path.iterdir()) == []


def boot_until(words: bytes, firmware: UefiFirmware, store: Path) -> None:
    argv: list[str | Path] = [
        *(get_program("qemu-system-x86_64", package="qemu-system-x86"), "-nodefaults"),
        *("-no-user-config", "-display", "none", "-sandbox", SANDBOX),
        *("-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", "256M", "-serial", "stdio"),
        *("-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={firmware.code}"),
        *("-drive", f"if=pflash,unit=1,format=qcow2,file={store}"),
    ]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as machine:
        overdue = threading.Timer(60, machine.kill)
        overdue.start()
        try:
            assert machine.stdout is not None
            seen = b""
            while words not in seen:
                chunk = os.read(machine.stdout.fileno(), 4096)
                assert chunk, f"QEMU ended: {seen[-500:]!r}"
                seen += chunk
        finally:
            overdue.cancel()
            machine.kill()


def read_flash(store: Path) -> bytes:
    told = subprocess.run(
        ["qemu-img", "info", "--output=json", store], check=True, timeout=20, capture_output=True
    )
    assert json.loads(told.stdout)["format"] == "qcow2"
    raw = store.with_suffix(".raw")
    subprocess.run(
        ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", store, raw], check=True, timeout=20
    )
    return raw.read_bytes()
