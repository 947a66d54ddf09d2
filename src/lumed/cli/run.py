"""`lume run`: start a machine, show what its guest does, and stay until it ends."""

from __future__ import annotations

import contextlib
import gc
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from lumed.cli.bars import follow
from lumed.cli.link import Link
from lumed.cli.names import complete_vms_and_images
from lumed.cli.output import say, show
from lumed.cli.vms import Storage, Unneeded, UnneededFlag, absolute, say_stopped, show_problems
from lumed.errors import InvalidField, LumedError, NotFound, NotPossibleHere

if TYPE_CHECKING:
    from lumed.client.calls import Share
    from lumed.client.client import Client
    from lumed.client.models import Vm

# What the guest prints on its serial console, and what it is doing then. SeaBIOS says nothing
# there; Debian guests and the tiny one have SYSLINUX, which it starts.
_SIGNS = (
    (b"BdsDxe", "firmware"),
    (b"SYSLINUX ", "boot loader"),
    (b"Linux version ", "kernel"),
    (b"Booting Linux on", "kernel"),
    (b"systemd[1]:", "system"),
    (b"cloud-init[", "cloud-init"),
    (b" login: ", "login"),
)
_LONGEST_SIGN = max(len(sign) for sign, _ in _SIGNS)
_WAIT_S = 600.0


def run(
    name: Annotated[str, Parameter(completer=complete_vms_and_images)],
    /,
    *,
    detach: Annotated[bool, Parameter(negative="", help="return when it is running")] = False,
    wait: Annotated[
        Literal["ip", "ssh", "agent"] | None,
        Parameter(help="detach, and return its address once it can be reached by that"),
    ] = None,
    display: Annotated[
        Literal["vnc", "native", "none"], Parameter(help="native opens a viewer")
    ] = "vnc",
    no_display: Annotated[bool, Parameter(name=["--no-display", "-d"], negative="")] = False,
    shared_dir: Annotated[
        list[str] | None, Parameter(help="a directory to share, PATH[:ro|:rw]; repeatable")
    ] = None,
    mount: Annotated[str | None, Parameter(help="an ISO to attach and boot from")] = None,
    recovery_mode: Annotated[
        Literal["true", "false"], Parameter(help="boot a small rescue system instead")
    ] = "false",
    network: Annotated[str | None, Parameter(help="nat, none, or bridged:INTERFACE")] = None,
    disk: Annotated[
        list[str] | None, Parameter(help="a disk image that the guest may write to; repeatable")
    ] = None,
    usb_storage: Annotated[
        list[str] | None, Parameter(help="a disk image as a read-only USB stick; repeatable")
    ] = None,
    vnc: Literal["enabled", "disabled"] = "enabled",
    vnc_port: Annotated[int, Parameter(help="5900 or more; 0 is any free one")] = 0,
    vnc_password: Annotated[
        str | None, Parameter(help="instead of a random one; others see it in the process list")
    ] = None,
    registry: Annotated[str | None, Parameter(help="of an image to pull")] = None,
    organization: Annotated[str | None, Parameter(help="of an image to pull")] = None,
    storage: Storage = None,
    disk_path: Annotated[str | None, Parameter(show=False)] = None,
    nvram_path: Annotated[str | None, Parameter(show=False)] = None,
    clipboard: UnneededFlag = False,
    log_file: Unneeded = None,
    link: Link = Link(),  # noqa: B008
) -> int:
    """Run a virtual machine, in front until it ends; Ctrl-C shuts it down.

    NAME may be an image, such as debian:12: what is missing is pulled and created first.

    Example: lume run web --shared-dir ~/project:ro
    Example: lume run debian:12 --wait ssh
    """
    for option, value in {"--disk-path": disk_path, "--nvram-path": nvram_path}.items():
        if value is not None:
            raise NotPossibleHere(
                f"{option} is not possible: a machine of lumed boots from its own disk",
                hint="attach another disk with --disk, or use lume create NAME --image FILE",
            )
    shares = [_read_share(share) for share in shared_dir or ()]
    with link.connect() as client:
        vm_name = _get_or_make(client, name, registry, organization, storage)
        accepted = client.run_vm(
            vm_name,
            shared_directories=shares,
            mount=absolute(mount),
            network=network,
            vnc=vnc,
            vnc_port=vnc_port or None,
            vnc_password=vnc_password,
            disks=[_absolute(path) for path in disk or ()],
            usb_storage=[_absolute(path) for path in usb_storage or ()],
            recovery_mode=recovery_mode == "true",
            no_display=no_display or display != "native",
            storage=storage,
        )
        if accepted.operation is not None:
            follow(client, accepted.operation)
        if wait is not None:
            vm = client.wait_vm(vm_name, wait, _WAIT_S)
            say(f"{vm_name} is running")
            if vm.ip_address is not None:
                show(vm.ip_address)
            return 0
        vm = client.get_vm(vm_name, storage)
        show_problems(vm)
        if detach:
            say(f"{vm_name} is running; its output: lume logs {vm_name} -f")
            return 0
        return _stay(client, vm_name)


def _read_share(text: str) -> Share:
    from lumed.client.calls import Share

    path, colon, mode = text.rpartition(":")
    if colon and mode in ("ro", "rw"):
        return Share(_absolute(path), mode == "ro")
    return Share(_absolute(text))


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _get_or_make(
    client: Client,
    name: str,
    registry: str | None,
    organization: str | None,
    storage: str | None,
) -> str:
    """The name of the VM that is meant; made first if it is that of an image."""
    if ":" not in name and "/" not in name:
        return name
    vm_name = name.rsplit("/", 1)[-1].partition("@")[0].replace(":", "_")
    with contextlib.suppress(NotFound):
        return client.get_vm(vm_name, storage).name
    say(f"making {vm_name} from {name}")
    vm: Vm | None = None
    if registry is None and organization is None and "/" not in name:
        try:
            vm = client.create_vm(vm_name, image=name, storage=storage)
        except InvalidField as error:
            # No name of the catalog or the cache: a registry may have it.
            if "image" not in error.fields:
                raise
    if vm is None:
        vm = client.pull_vm(
            name, vm_name, registry=registry, organization=organization, storage=storage
        )
    if vm.operation is not None:
        follow(client, vm.operation)
    return vm_name


def _stay(client: Client, name: str) -> int:
    """Show what the guest does until its machine ends; 1 if that was not in order."""
    gc.enable()
    threading.Thread(target=_tell_stages, args=(client, name), daemon=True).start()
    told = ""
    try:
        for event in client.events(vm=name):
            vm = event.vm or client.get_vm(name)
            if event.kind == "vm-deleted":
                raise NotFound(f"{name} was deleted")
            if not vm.is_alive:
                show_problems(vm)
                say_stopped(vm)
                return 0 if vm.state == "stopped" else 1
            if vm.ip_address is not None and vm.ip_address != told:
                told = vm.ip_address
                say(f"{name}: reachable at {told}")
    except KeyboardInterrupt:
        return _stop(client, name)
    raise LumedError("The server ended; its machines run on", hint=f"look: lume get {name}")


def _stop(client: Client, name: str) -> int:
    say(f"\nshutting {name} down; Ctrl-C again ends it at once")
    try:
        vm = client.stop_vm(name)
    except KeyboardInterrupt:
        vm = client.stop_vm(name, force=True)
    say_stopped(vm)
    return 0


def _tell_stages(client: Client, name: str) -> None:
    """Say what the guest is doing, by what it prints."""
    seen, tail = "", b""
    # Whatever ends this, the machine's own end is told by the other.
    with contextlib.suppress(LumedError):
        for chunk in client.follow_vm_logs(name):
            tail = tail[-_LONGEST_SIGN:] + chunk
            for sign, stage in _SIGNS:
                if sign in tail and stage != seen and _comes_after(stage, seen):
                    seen = stage
                    say(f"{name}: {stage}")


def _comes_after(stage: str, other: str) -> bool:
    order = ["", *dict.fromkeys(stage for _, stage in _SIGNS)]
    return order.index(stage) > order.index(other)
