"""The files that say what a VM is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumed.errors import Damaged
from lumed.model.vm import Architecture, Display, Firmware, GuestOs, PortForward, VmConfig
from lumed.store.vmdir import VmDir, read_config, write_config

CONFIG = VmConfig(
    uuid="8c5f5b1e-0f4d-4a7e-9a30-4c1f6b0c2f11",
    os=GuestOs.LINUX,
    cpu_count=2,
    memory_bytes=4 << 30,
    disk_size_bytes=64 << 30,
    display=Display(800, 600),
    mac_address="52:54:00:12:34:56",
    network="none",
    firmware=Firmware.BIOS,
    image="tiny",
    ports=(PortForward(8000), PortForward(22, 2222)),
    ssh_keys=("ssh-ed25519 AAAA me",),
    user_data="#cloud-config\n",
    created_at="2026-11-24T12:00:00.000Z",
)


def make_dir(folder: Path) -> VmDir:
    vm_dir = VmDir(folder / "web")
    vm_dir.path.mkdir()
    return vm_dir


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    vm_dir = make_dir(tmp_path)
    arm = replace(CONFIG, architecture=Architecture.ARM64, firmware=Firmware.UEFI)
    for config in (CONFIG, arm, replace(CONFIG, image=None, ports=(), ssh_keys=(), user_data=None)):
        write_config(vm_dir, config)
        assert read_config(vm_dir) == config
    assert sorted(p.name for p in vm_dir.path.iterdir()) == ["config.json", "lumed.json"]


def test_a_vm_of_an_earlier_version_is_amd64(tmp_path: Path) -> None:
    vm_dir = make_dir(tmp_path)
    write_config(vm_dir, CONFIG)
    extra = json.loads(vm_dir.extra.read_text())
    assert extra.pop("architecture") == "amd64"
    vm_dir.extra.write_text(json.dumps(extra))
    assert read_config(vm_dir) == CONFIG


def test_lumes_keys_stand_in_lumes_file(tmp_path: Path) -> None:
    vm_dir = make_dir(tmp_path)
    write_config(vm_dir, CONFIG)
    assert json.loads(vm_dir.config.read_text()) == {
        "os": "linux",
        "cpuCount": 2,
        "memorySize": 4 << 30,
        "diskSize": 64 << 30,
        "macAddress": "52:54:00:12:34:56",
        "display": "800x600",
        "networkMode": "none",
    }


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "os", "plan9"),
        ("config.json", "cpuCount", "2"),
        ("config.json", "cpuCount", True),
        ("config.json", "memorySize", -1),
        ("config.json", "diskSize", None),
        ("config.json", "display", "0x0"),
        ("config.json", "macAddress", "52:54:00:12:34:56,script=/x"),
        ("config.json", "networkMode", ["nat"]),
        ("lumed.json", "uuid", "../../../etc"),
        ("lumed.json", "architecture", "riscv64"),
        ("lumed.json", "firmware", "coreboot"),
        ("lumed.json", "image", 3),
        ("lumed.json", "ports", {"guestPort": 8000}),
        ("lumed.json", "ports", [8000]),
        ("lumed.json", "ports", [{"guestPort": 8000, "hostPort": "x"}]),
        ("lumed.json", "sshKeys", "key"),
        ("lumed.json", "userData", []),
    ],
)
def test_a_value_that_cannot_be_is_damage_that_names_it(
    tmp_path: Path, file: str, key: str, value: object
) -> None:
    vm_dir = make_dir(tmp_path)
    write_config(vm_dir, CONFIG)
    path = vm_dir.path / file
    text = json.dumps(json.loads(path.read_text()) | {key: value})
    path.write_text(text)
    with pytest.raises(Damaged, match="The VM web cannot be read"):
        read_config(vm_dir)
    assert path.read_text() == text


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b"{}"])
@pytest.mark.parametrize("file", ["config.json", "lumed.json"])
def test_a_torn_file_is_damage(tmp_path: Path, file: str, content: bytes) -> None:
    vm_dir = make_dir(tmp_path)
    write_config(vm_dir, CONFIG)
    (vm_dir.path / file).write_bytes(content)
    with pytest.raises(Damaged):
        read_config(vm_dir)


def test_a_missing_file_is_damage_that_names_it(tmp_path: Path) -> None:
    vm_dir = make_dir(tmp_path)
    write_config(vm_dir, CONFIG)
    vm_dir.extra.unlink()
    with pytest.raises(Damaged, match=r"No such file or directory: .*lumed\.json"):
        read_config(vm_dir)


_KEYS = st.sampled_from(
    [
        *("os", "cpuCount", "memorySize", "diskSize", "display", "macAddress", "networkMode"),
        *(
            "uuid",
            "firmware",
            "image",
            "ports",
            "sshKeys",
            "userData",
            "createdAt",
            "guestPort",
            "architecture",
        ),
    ]
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=5),
    max_leaves=10,
)
_CHANGES = st.dictionaries(_KEYS, _JSON, max_size=3)


@given(config=_JSON | _CHANGES, extra=_JSON | _CHANGES, whole=st.booleans())
def test_any_json_is_a_vm_or_damage(config: object, extra: object, whole: bool) -> None:
    with TemporaryDirectory() as folder:
        vm_dir = make_dir(Path(folder))
        write_config(vm_dir, CONFIG)
        for path, value in ((vm_dir.config, config), (vm_dir.extra, extra)):
            if not whole and isinstance(value, dict):
                # A whole file with some values changed gets further than a random one.
                value = json.loads(path.read_text()) | value
            path.write_text(json.dumps(value))
        try:
            found = read_config(vm_dir)
        except Damaged:
            return
        write_config(vm_dir, found)
        assert read_config(vm_dir) == found
