"""Views of VMs: the same object while nothing changes, and never an old one."""

from dataclasses import replace
from pathlib import Path

from lumed.model.vm import Display, GuestOs, VmConfig
from lumed.service.view import Views
from lumed.store.index import StoredVm
from lumed.store.vmdir import VmDir

CONFIG = VmConfig(
    uuid="f43ce99c-7ea7-414e-96f0-ffc4b7e03062",
    os=GuestOs.LINUX,
    cpu_count=1,
    memory_bytes=256 << 20,
    disk_size_bytes=1 << 30,
    display=Display(),
    mac_address="52:54:00:40:81:e8",
)


PLACE = VmDir(Path("/vms/a"))


def stored_vm(config: VmConfig = CONFIG) -> StoredVm:
    return StoredVm(PLACE, "home", config, None, 0, None, ())


def test_while_nothing_changes_the_view_is_the_same_object() -> None:
    views, vm = Views(), stored_vm()
    assert views.of(vm, None, None) is views.of(vm, None, None)
    assert views.of(vm, None, "op-1").operation == "op-1"


def test_a_vm_that_took_the_memory_of_an_older_one_is_seen_as_it_is() -> None:
    views, changed = Views(), replace(CONFIG, cpu_count=2)
    old = stored_vm()
    assert views.of(old, None, None).cpu_count == 1
    address = id(old)
    del old
    # Were the old one freed, one of these would have its address.
    new = [stored_vm(changed) for _ in range(100)]
    same = [vm for vm in new if id(vm) == address]
    assert views.of((same or new)[0], None, None).cpu_count == 2
