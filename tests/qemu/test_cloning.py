"""Clones of disks by the real qemu-img, judged by it: independent of each other, always."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from lumed.errors import AlreadyExists, Damaged, NoSpace, WrongState
from lumed.model.vm import DiskFormat, Display, GuestOs, VmConfig
from lumed.service import cloning
from lumed.service.cloning import make_clone
from lumed.service.operations import Operations, RunningOperation
from lumed.service.tasks import TaskOwner
from lumed.store.disk import create_empty, create_overlay, grow
from lumed.store.layers import (
    MOST_LAYERS,
    Backing,
    find_image,
    hold_still,
    read_backing,
    read_layers,
)
from lumed.store.staging import sweep
from lumed.store.vmdir import VmDir, read_config, write_config
from tests.qemu.test_vm_disk import held_open, info, tool

MIB = 1 << 20
CONFIG = VmConfig(
    uuid="11111111-2222-3333-4444-555555555555",
    os=GuestOs.LINUX,
    cpu_count=2,
    memory_bytes=512 * MIB,
    disk_size_bytes=64 * MIB,
    display=Display(),
    mac_address="52:54:00:00:00:01",
    ssh_keys=("ssh-ed25519 AAAA me",),
)


class World:
    """VMs in a location, and for each what its disk must hold: one byte for each 256 KiB."""

    STEP = 256 << 10

    def __init__(self, location: Path) -> None:
        self.location = location
        self.operations = Operations(location / "operations", TaskOwner())
        self.operations._directory.mkdir(parents=True)
        self.image = location / "image.raw"
        self.held: dict[str, bytearray] = {}

    def vm(self, name: str) -> VmDir:
        return VmDir(self.location / name)

    async def create(self, name: str, size_mib: int = 16) -> VmDir:
        """A VM over an image whose first 8 MiB are of the byte 1."""
        if not self.image.exists():
            self.image.write_bytes(b"\x01" * (8 * MIB))
        vm = self.vm(name)
        vm.path.mkdir()
        await create_overlay(vm.disk, self.image, DiskFormat.RAW, size_mib * MIB)
        write_config(vm, CONFIG)
        self.held[name] = bytearray(b"\x01" * 32 + bytes(size_mib * 4 - 32))
        return vm

    def write(self, name: str, at: int, count: int, value: int) -> None:
        """Fill some steps of a disk, as its guest would."""
        command = f"write -P {value} {at * self.STEP} {count * self.STEP}"
        tool("qemu-io", "-f", "qcow2", "-c", command, self.vm(name).disk)
        self.held[name][at : at + count] = bytes([value]) * count

    async def clone(self, source: str, name: str, location: Path | None = None) -> VmDir:
        """Clone a VM as an operation of the engine would."""
        place = location or self.location
        made = partial(make_clone, self.vm(source), CONFIG, name, place)

        async def work(operation: RunningOperation) -> None:
            await made(operation)

        operation = await self.operations.start("clone", name, work)
        over = await self.operations.wait(operation.id, 60)
        if over.error is not None:
            raise self.operations.get_failure(operation.id)
        self.held[name] = bytearray(self.held[source])
        return VmDir(place / name)

    async def grow(self, name: str, steps: int) -> None:
        self.held[name] += bytes(steps)
        await grow(self.vm(name).disk, DiskFormat.QCOW2, len(self.held[name]) * self.STEP)

    def delete(self, name: str) -> None:
        shutil.rmtree(self.vm(name).path)
        del self.held[name]

    def check(self, name: str, vm: VmDir | None = None) -> None:
        """Its disk holds what was written to it, and its folder nothing that it does not need."""
        vm = vm or self.vm(name)
        held = self.held[name]
        assert info(vm.disk)["virtual-size"] == len(held) * self.STEP
        reads: list[str] = []
        at = 0
        while at < len(held):
            end = at
            while end < len(held) and held[end] == held[at]:
                end += 1
            reads += ["-c", f"read -P {held[at]} {at * self.STEP} {(end - at) * self.STEP}"]
            at = end
        seen = tool("qemu-io", "-r", "-f", "qcow2", *reads, vm.disk)
        assert "verification failed" not in seen, (name, seen)
        layers = read_layers(vm.disk)
        assert {file.name for file in vm.path.glob("layer-*")} == {file.name for file in layers}
        for layer in layers:
            assert stat.S_IMODE(layer.stat().st_mode) == 0o444
        leftovers = {file.name for file in vm.path.iterdir()} - {layer.name for layer in layers}
        assert leftovers <= {"disk.qcow2", "config.json", "lumed.json", "uefi-vars.qcow2"}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A location; small writes count as much, or the tests would write gigabytes."""
    monkeypatch.setattr(cloning, "_COPIED_BYTES", MIB)
    return World(tmp_path)


async def test_source_and_clone_go_their_own_ways(world: World) -> None:
    source = await world.create("source")
    world.write("source", 0, 8, 2)
    clone = await world.clone("source", "clone")
    assert read_layers(source.disk)[0].samefile(read_layers(clone.disk)[0])
    world.write("source", 4, 8, 3)
    world.write("clone", 0, 2, 4)
    for name in world.held:
        world.check(name)
    world.delete("source")
    world.check("clone")


async def test_a_clone_is_a_machine_of_its_own(world: World) -> None:
    source = await world.create("source")
    source.uefi_vars.write_bytes(b"boot order")
    for file in (source.run_lock, source.end_record, source.serial_log, source.seed):
        file.touch()
    clone = await world.clone("source", "clone")
    config = read_config(clone)
    assert config.is_clone
    assert not read_config(source).is_clone
    assert config.uuid != CONFIG.uuid
    assert config.mac_address != CONFIG.mac_address
    assert config.created_at
    assert config.ssh_keys == CONFIG.ssh_keys
    assert clone.uefi_vars.read_bytes() == b"boot order"
    assert stat.S_IMODE(clone.disk.stat().st_mode) == 0o600
    names = {file.name for file in clone.path.iterdir()}
    assert names == {"disk.qcow2", "config.json", "lumed.json", "uefi-vars.qcow2"}


@pytest.mark.parametrize("seed", range(3))
async def test_a_random_life_of_clones_never_mixes_their_data(
    world: World, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloning, "MOST_LAYERS", 3)
    seed = int(os.environ.get("LUMED_SEED", str(os.getpid()))) + seed
    print(f"LUMED_SEED={seed}")
    chance = random.Random(seed)  # noqa: S311
    await world.create("vm0")
    for number in range(1, 31):
        name = chance.choice(sorted(world.held))
        steps = len(world.held[name])
        match chance.choice(["clone", "clone", "write", "write", "write", "grow", "delete"]):
            case "clone":
                await world.clone(name, f"vm{number}")
            case "write":
                at = chance.randrange(steps - 8)
                world.write(name, at, chance.randint(1, 8), chance.randint(2, 255))
            case "grow":
                await world.grow(name, chance.randint(1, 40))
            case "delete" if len(world.held) > 1:
                world.delete(name)
    for name in sorted(world.held, key=lambda _: chance.random()):
        world.check(name)
        world.delete(name)
    assert not list(world.location.glob("**/layer-*"))


async def test_a_disk_without_new_data_gains_no_layer_however_often_it_is_cloned(
    world: World,
) -> None:
    source = await world.create("source")
    await world.clone("source", "fresh")
    assert read_layers(source.disk) == ()
    world.write("source", 0, 8, 2)
    for number in range(5):
        await world.clone("source", f"clone{number}")
    assert len(read_layers(source.disk)) == 1
    assert read_layers(source.disk)[0].stat().st_nlink == 6
    world.check("clone4")


async def test_a_chain_that_has_grown_long_becomes_one_layer(world: World) -> None:
    source = await world.create("source")
    for number in range(MOST_LAYERS + 2):
        world.write("source", number, 6, number + 2)
        await world.clone("source", f"clone{number}")
        assert len(read_layers(source.disk)) <= MOST_LAYERS
    assert len(read_layers(source.disk)) == 2
    assert find_image(source.disk) == Backing(str(world.image), DiskFormat.RAW)
    for name in world.held:
        world.check(name)


async def test_joining_the_layers_of_a_disk_without_an_image_leaves_one_that_stands_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloning, "MOST_LAYERS", 2)
    source = world.vm("source")
    source.path.mkdir()
    await create_empty(source.disk, 16 * MIB)
    write_config(source, CONFIG)
    world.held["source"] = bytearray(64)
    for number in range(3):
        world.write("source", number * 7, 8, number + 2)
        await world.clone("source", f"clone{number}")
    (layer,) = read_layers(source.disk)
    assert read_backing(layer) is None
    for name in world.held:
        world.check(name)


async def test_a_disk_in_use_is_not_cloned_and_a_disk_being_cloned_is_not_opened(
    world: World,
) -> None:
    source = await world.create("source")
    with held_open(source.disk), pytest.raises(WrongState, match="in use by a running machine"):
        await world.clone("source", "clone")
    assert not world.vm("clone").path.exists()
    with hold_still(source.disk), pytest.raises(subprocess.CalledProcessError) as refused:
        world.write("source", 0, 1, 2)
    assert 'Failed to get "write" lock' in refused.value.stderr
    world.check("source")


async def test_a_layer_is_read_by_two_machines_at_once(world: World) -> None:
    source = await world.create("source")
    world.write("source", 0, 8, 2)
    clone = await world.clone("source", "clone")
    with held_open(source.disk), held_open(clone.disk):
        pass


async def test_a_clone_of_a_vm_whose_layer_is_missing_says_which(world: World) -> None:
    source = await world.create("source")
    world.write("source", 0, 8, 2)
    await world.clone("source", "clone")
    read_layers(source.disk)[0].unlink()
    with pytest.raises(Damaged, match=r"layer-.*cannot be read: No such file"):
        await world.clone("source", "other")
    assert not world.vm("other").path.exists()
    world.check("clone")


async def test_a_name_that_appeared_meanwhile_is_kept(world: World) -> None:
    await world.create("source")
    await world.create("clone")
    with pytest.raises(AlreadyExists):
        await world.clone("source", "clone")
    world.check("clone")
    assert not list((world.location / ".staging").iterdir())


@contextlib.contextmanager
def mounted(path: Path, *arguments: str) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    path.mkdir()
    tool("mount", *arguments, path)
    try:
        yield path
    finally:
        tool("umount", "-l", path)


async def test_on_another_file_system_a_clone_has_copies_of_all_layers(
    world: World, tmp_path: Path
) -> None:
    source = await world.create("source")
    world.write("source", 0, 8, 2)
    await world.clone("source", "near")
    world.write("source", 4, 8, 3)
    with mounted(tmp_path / "far", "-t", "tmpfs", "-o", "size=64m", "tmpfs") as far:
        clone = await world.clone("source", "clone", far)
        assert not read_layers(clone.disk)[0].samefile(read_layers(source.disk)[0])
        # It was not frozen for that.
        assert len(read_layers(source.disk)) == 1
        world.check("clone", clone)
    world.check("source")


async def test_a_clone_for_which_there_is_no_space_leaves_nothing(
    world: World, tmp_path: Path
) -> None:
    await world.create("source")
    world.write("source", 0, 40, 2)
    with mounted(tmp_path / "far", "-t", "tmpfs", "-o", "size=6m", "tmpfs") as far:
        with pytest.raises(NoSpace, match="Not enough space"):
            await world.clone("source", "clone", far)
        assert [path.name for path in far.glob("**/*")] == [".staging"]
    world.check("source")


async def test_where_the_file_system_shares_blocks_a_clone_needs_no_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("mkfs.btrfs") is None:
        pytest.skip("btrfs-progs is not installed")
    monkeypatch.setattr(cloning, "_COPIED_BYTES", 0)
    with (tmp_path / "device").open("wb") as device:
        device.truncate(256 * MIB)
    tool("mkfs.btrfs", "-q", tmp_path / "device")
    with mounted(tmp_path / "home", "-o", "loop", str(tmp_path / "device")) as home:
        world = World(home)
        source = await world.create("source")
        world.write("source", 0, 24, 2)
        clone = await world.clone("source", "clone")
        assert read_layers(source.disk) == read_layers(clone.disk) == ()
        world.write("source", 4, 8, 3)
        world.write("clone", 0, 2, 4)
        world.check("source")
        world.delete("source")
        world.check("clone")


# Every change of the file system asks first (sys.audit), so a process can die before any of them.
_CHANGES = {"os.link", "os.rename", "os.remove", "os.chmod", "os.mkdir", "os.rmdir"}
_CHANGES |= {"open", "os.truncate", "subprocess.Popen"}


def clone_until(world: World, step: int) -> bool:
    """Clone the source in a process that dies before its step-th change; False if it did."""
    child = os.fork()
    if child != 0:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL)
        return status == 0
    try:
        left = step

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event not in _CHANGES or str(world.location) not in repr(arguments):
                return
            if event == "open" and not int(str(arguments[2])) & (os.O_WRONLY | os.O_RDWR):
                return
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        # The threads of this one have stayed behind in the parent.
        cloning._threads = ThreadPoolExecutor(1)
        sys.addaudithook(count)
        asyncio.run(world.clone("source", "clone"))
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("most_layers", [16, 1], ids=["freeze", "flatten"])
def test_a_kill_before_any_step_of_a_clone_leaves_both_whole_or_the_name_free(
    world: World, most_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloning, "MOST_LAYERS", most_layers)
    source = asyncio.run(world.create("source"))
    world.write("source", 0, 8, 2)
    asyncio.run(world.clone("source", "older"))
    step = 0
    over = False
    while not over:
        step += 1
        # New data each time, or there would be nothing to freeze.
        world.write("source", step % 50, 6, 2 + step % 200)
        over = clone_until(world, step)
        sweep([world.location])
        world.held["clone"] = bytearray(world.held["source"])
        # What a machine would do next: write, whatever is left lying about.
        world.write("source", 60, 1, 2 + step)
        if (world.vm("clone").path / "config.json").exists():
            world.check("clone")
            world.delete("clone")
        else:
            assert not world.vm("clone").path.exists()
            assert not over
            del world.held["clone"]
    assert step > 12
    print(f"{step} steps")
    asyncio.run(world.clone("source", "last"))
    for name in world.held:
        world.check(name)
    assert {file.name for file in source.path.glob("*.qcow2")} == {
        "disk.qcow2",
        *(layer.name for layer in read_layers(source.disk)),
    }
