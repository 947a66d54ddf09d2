"""The VMs on disk: a list sees every change that was made before it, however it was made."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from lumed.model.vm import Display, Firmware, GuestOs, VmConfig
from lumed.settings import read_settings
from lumed.store.index import StoredVm, VmIndex
from lumed.store.layout import Home
from lumed.store.locations import Locations
from lumed.store.vmdir import VmDir, write_config
from lumed.store.watch import FolderWatch

CONFIG = VmConfig(
    uuid="f43ce99c-7ea7-414e-96f0-ffc4b7e03062",
    os=GuestOs.LINUX,
    cpu_count=1,
    memory_bytes=256 << 20,
    disk_size_bytes=1 << 30,
    display=Display(),
    mac_address="52:54:00:40:81:e8",
    network="nat",
    firmware=Firmware.BIOS,
)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.prepare()
    return home


@pytest.fixture(params=["told by the kernel", "without a watch"])
def index(home: Home, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> VmIndex:
    """An index; once as on file systems that tell nothing."""
    if request.param == "without a watch":
        monkeypatch.setattr(FolderWatch, "add", lambda *_: None)
    return VmIndex(Locations(home, read_settings(home.root / "config.yaml")))


def make_vm(home: Home, name: str, cpu_count: int = 1) -> VmDir:
    vm_dir = VmDir(home.location("home") / name)
    vm_dir.path.mkdir()
    vm_dir.disk.write_bytes(b"disk")
    write_config(vm_dir, replace(CONFIG, cpu_count=cpu_count))
    return vm_dir


def cpus(index: VmIndex) -> dict[str, int]:
    """What a list shows; 0 for a VM that cannot be read."""
    return {vm.name: vm.config.cpu_count if vm.config else 0 for vm in index.list_vms()}


def the_only(index: VmIndex) -> StoredVm:
    (found,) = index.list_vms()
    return found


def edit_in_place(file: Path, key: str, value: object) -> None:
    """As an editor does that keeps the file: same inode, other content."""
    inode = file.stat().st_ino
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {key: value}))
    assert file.stat().st_ino == inode


def test_while_nothing_changes_a_list_holds_the_same_objects(home: Home, index: VmIndex) -> None:
    make_vm(home, "a")
    assert the_only(index) is the_only(index)


def test_a_file_that_was_edited_in_place_is_read_again(home: Home, index: VmIndex) -> None:
    a = make_vm(home, "a")
    assert cpus(index) == {"a": 1}
    for count in (2, 30, 4):
        edit_in_place(a.config, "cpuCount", count)
        assert cpus(index) == {"a": count}
    a.extra.write_text("{")
    assert cpus(index) == {"a": 0}


def test_a_file_that_was_replaced_is_read_again(home: Home, index: VmIndex) -> None:
    a = make_vm(home, "a")
    assert cpus(index) == {"a": 1}
    for count in (2, 3, 4):
        write_config(a, replace(CONFIG, cpu_count=count))
        assert cpus(index) == {"a": count}


def test_folders_that_change_their_names_are_seen_as_they_are(home: Home, index: VmIndex) -> None:
    a, b = make_vm(home, "a", 1), make_vm(home, "b", 2)
    # Without disks, whose inodes would tell them apart too.
    a.disk.unlink()
    b.disk.unlink()
    assert cpus(index) == {"a": 1, "b": 2}
    spare = a.path.with_name("c")
    a.path.rename(spare)
    assert cpus(index) == {"b": 2, "c": 1}
    b.path.rename(a.path)
    spare.rename(b.path)
    assert cpus(index) == {"a": 2, "b": 1}
    write_config(VmDir(a.path), replace(CONFIG, cpu_count=5))
    write_config(VmDir(b.path), replace(CONFIG, cpu_count=6))
    assert cpus(index) == {"a": 5, "b": 6}


def test_a_vm_that_was_made_anew_under_its_name_is_read_again(home: Home, index: VmIndex) -> None:
    a = make_vm(home, "a")
    assert cpus(index) == {"a": 1}
    a.path.rename(home.root / "elsewhere")
    assert cpus(index) == {}
    make_vm(home, "a", 7)
    assert cpus(index) == {"a": 7}


def test_a_location_that_was_put_in_the_place_of_another_is_read(
    home: Home, index: VmIndex
) -> None:
    make_vm(home, "a")
    assert cpus(index) == {"a": 1}
    home.location("home").rename(home.root / "old")
    home.location("home").mkdir()
    make_vm(home, "a", 8)
    assert cpus(index) == {"a": 8}


def test_the_growth_of_a_disk_that_stays_open_is_seen(home: Home, index: VmIndex) -> None:
    a = make_vm(home, "a")
    before = the_only(index).allocated_bytes
    with a.disk.open("r+b") as disk:
        disk.write(os.urandom(1 << 20))
        disk.flush()
        os.fsync(disk.fileno())
        assert the_only(index).allocated_bytes >= before + (1 << 20) - 4096


def test_more_changes_than_the_kernel_remembers_are_not_missed(home: Home, index: VmIndex) -> None:
    a = make_vm(home, "a")
    assert cpus(index) == {"a": 1}
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    noise = make_vm(home, "noise")
    assert cpus(index) == {"a": 1, "noise": 1}
    # Each renaming is two events; identical ones in a row would count as one.
    one, two = noise.path / "one", noise.path / "two"
    one.touch()
    for _ in range(limit // 4 + 1):
        one.rename(two)
        two.rename(one)
    edit_in_place(a.config, "cpuCount", 9)
    assert cpus(index) == {"a": 9, "noise": 1}
