"""The VMs on disk, seen as they are whoever changed them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lumed.errors import NotFound
from lumed.model.end import EndCause, MachineEnd
from lumed.model.vm import DiskFormat, VmConfig
from lumed.settings import Settings
from lumed.store.disk import create_empty, grow
from lumed.store.index import VmIndex
from lumed.store.layout import Home
from lumed.store.locations import Locations
from lumed.store.runrecord import write_end_record
from lumed.store.vmdir import VmDir, read_config, write_config
from lumed.units import MIB
from tests.unit.test_vmdir import CONFIG


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.prepare()
    return home


@pytest.fixture
def index(home: Home) -> VmIndex:
    return VmIndex(Locations(home, Settings()))


def make_vm(home: Home, name: str, location: str = "home") -> VmDir:
    vm_dir = VmDir(home.location(location) / name)
    vm_dir.path.mkdir(parents=True)
    write_config(vm_dir, CONFIG)
    return vm_dir


def names(index: VmIndex, location: str | None = None) -> list[str]:
    return [vm.name for vm in index.list_vms(location)]


def test_vms_are_listed_by_name_over_all_locations_or_one(home: Home, index: VmIndex) -> None:
    assert names(index) == []
    for name, location in (("b", "home"), ("a", "ssd"), ("c", "home")):
        make_vm(home, name, location)
    assert names(index) == ["a", "b", "c"]
    assert names(index, "home") == ["b", "c"]
    assert names(index, "hdd") == names(index, "nowhere") == []
    assert [vm.location_name for vm in index.list_vms()] == ["ssd", "home", "home"]


def test_while_nothing_changes_the_same_object_comes_back(home: Home, index: VmIndex) -> None:
    vm_dir = make_vm(home, "web")
    first = index.get("web")
    assert index.get("web") is first
    assert index.list_vms() == [first]
    assert index.list_vms()[0] is first
    write_end_record(vm_dir.end_record, MachineEnd(EndCause.CRASHED, "gone", "2026"))
    second = index.get("web")
    assert second is not first
    assert second.end is not None


def test_a_vm_that_is_edited_moved_or_removed_by_hand_is_seen_as_it_is(
    home: Home, index: VmIndex
) -> None:
    vm_dir = make_vm(home, "web")
    assert index.get("web").config == CONFIG
    text = vm_dir.config.read_text()
    vm_dir.config.write_text(text.replace('"cpuCount": 2', '"cpuCount": 8'))
    config = index.get("web").config
    assert config is not None
    assert config.cpu_count == 8
    vm_dir.path.rename(home.location("home") / "moved")
    assert names(index) == ["moved"]
    assert index.find("web") is None
    shutil.rmtree(home.location("home") / "moved")
    assert names(index) == []


def test_a_damaged_vm_is_listed_with_the_reason_until_it_is_mended(
    home: Home, index: VmIndex
) -> None:
    vm_dir = make_vm(home, "web")
    make_vm(home, "other")
    good = vm_dir.config.read_text()
    vm_dir.config.write_text("{ torn")
    damaged = index.get("web")
    assert damaged.config is None
    assert "The VM web cannot be read" in str(damaged.damage)
    assert names(index) == ["other", "web"]
    vm_dir.config.write_text(good)
    assert index.get("web").config == CONFIG


def test_folders_files_and_links_that_are_no_vms_are_not_listed(home: Home, index: VmIndex) -> None:
    place = home.location("home")
    real = make_vm(home, "web", "ssd")
    (place / "notes").mkdir()
    (place / "file").touch()
    (place / ".hidden").mkdir()
    (place / "link").symlink_to(real.path)
    (place / "loop").symlink_to("loop")
    assert names(index) == ["web"]
    assert index.find(".hidden") is None
    assert index.find("..") is None
    assert index.find("notes") is None


def test_a_missing_vm_says_where_the_name_exists(home: Home, index: VmIndex) -> None:
    make_vm(home, "web", "ssd")
    with pytest.raises(NotFound, match="Virtual machine not found: web") as caught:
        index.get("web", "hdd")
    assert caught.value.hint == "it is in storage ssd"
    with pytest.raises(NotFound) as caught:
        index.get("nothing", "hdd")
    assert caught.value.hint is None


async def test_the_disk_itself_says_how_large_it_is(home: Home, index: VmIndex) -> None:
    vm_dir = make_vm(home, "web")
    await create_empty(vm_dir.disk, 64 * MIB)
    stored = index.get("web")
    assert stored.config is not None
    assert stored.config.disk_size_bytes == 64 * MIB
    assert 0 < stored.allocated_bytes < MIB
    # A server that was killed between growing the disk and writing it down.
    await grow(vm_dir.disk, DiskFormat.QCOW2, 8 << 40)
    grown = index.get("web").config
    assert grown is not None
    assert grown.disk_size_bytes == 8 << 40


def test_a_location_that_cannot_be_read_hides_no_other(home: Home, index: VmIndex) -> None:
    make_vm(home, "web")
    (home.root / "storage").mkdir()
    home.location("ssd").symlink_to("/proc/1/fdinfo/none")
    home.location("hdd").write_text("a file")
    assert names(index) == ["web"]


def test_a_vm_that_is_deleted_while_it_is_read_is_gone_and_not_damaged(
    home: Home, index: VmIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm_dir = make_vm(home, "web")

    def delete_first(read: VmDir) -> VmConfig:
        shutil.rmtree(vm_dir.path)
        return read_config(read)

    monkeypatch.setattr("lumed.store.index.read_config", delete_first)
    assert index.find("web") is None
    assert names(index) == []
