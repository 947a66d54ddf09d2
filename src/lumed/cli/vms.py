"""The commands of VMs."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from lumed.cli.bars import follow
from lumed.cli.link import Link
from lumed.cli.names import VmName, complete_images
from lumed.cli.output import Column, Format, say, show_data, show_table
from lumed.errors import LumedError, NotPossibleHere
from lumed.units import describe_size, format_size

if TYPE_CHECKING:
    from lumed.client.models import Vm

Storage = Annotated[str | None, Parameter(help="a location's name, or an absolute path")]
AsFormat = Annotated[Format, Parameter(name=["--format", "-f"], help="text, json or yaml")]
# Options of Lume's command that mean nothing on this host: taken, so that scripts go on.
Unneeded = Annotated[str | None, Parameter(show=False)]
UnneededFlag = Annotated[bool, Parameter(show=False, negative="")]


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class _Login:
    """How Lume's own command logs in to shut a guest down; a power button needs none of it."""

    user: Annotated[str, Parameter(name=["--user", "-u"], show=False)] = ""
    password: Annotated[str, Parameter(name=["--password", "-p"], show=False)] = ""
    timeout: Annotated[int, Parameter(name=["--timeout", "-t"], show=False)] = 30


def create(
    name: str,
    /,
    *,
    os: str = "linux",
    cpu: Annotated[int, Parameter(help="CPU cores")] = 4,
    memory: Annotated[str, Parameter(help="such as 8GB")] = "8GB",
    disk_size: Annotated[str, Parameter(help="such as 50GB; space is taken as it is used")] = (
        "50GB"
    ),
    display: str = "1024x768",
    image: Annotated[
        str | None,
        Parameter(
            help="what is on the disk: debian:12, a reference, or the path of an image",
            completer=complete_images,
        ),
    ] = None,
    ipsw: Annotated[
        str | None, Parameter(help="the same, as Lume calls it", completer=complete_images)
    ] = None,
    storage: Storage = None,
    network: Annotated[str, Parameter(help="nat, none, or bridged:INTERFACE")] = "nat",
    user_data: Annotated[Path | None, Parameter(help="a file of cloud-init user data")] = None,
    ssh_key: Annotated[
        list[str] | None, Parameter(help="a public key, or the file of one; repeatable")
    ] = None,
    port: Annotated[
        list[int] | None, Parameter(help="a guest port to reach from here; repeatable")
    ] = None,
    firmware: Literal["bios", "uefi"] | None = None,
    unattended: Annotated[str | None, Parameter(show=False)] = None,
    debug: UnneededFlag = False,
    debug_dir: Unneeded = None,
    no_display: UnneededFlag = False,
    vnc_port: Annotated[int, Parameter(show=False)] = 0,
    link: Link = Link(),  # noqa: B008 - it is frozen
) -> None:
    """Create a virtual machine.

    Example: lume create web --image debian:12 --cpu 2 --memory 4GB
    """
    if unattended is not None:
        raise NotPossibleHere(
            "--unattended is for macOS, which needs Apple hardware",
            hint="Linux guests are set up by cloud-init: --user-data FILE",
        )
    with link.connect() as client:
        vm = client.create_vm(
            name,
            os=os,
            cpu=cpu,
            memory=memory,
            disk_size=disk_size,
            display=display,
            image=absolute(image),
            ipsw=absolute(ipsw),
            storage=storage,
            network=network,
            user_data=None if user_data is None else read_text(user_data),
            ssh_keys=[_read_key(key) for key in ssh_key or ()],
            ports=port,
            firmware=firmware,
        )
        if vm.operation is not None:
            follow(client, vm.operation)
    say(f"{name} is created; start it: lume run {name}")


def ls(*, format: AsFormat = "text", storage: Storage = None, link: Link = Link()) -> None:  # noqa: B008
    """List the virtual machines.

    Example: lume ls --format json
    """
    with link.connect() as client:
        vms = client.list_vms(storage)
    if format == "text" and not vms:
        say("No virtual machines found")
        return
    _show_vms(vms, format)


def get(
    name: VmName,
    /,
    *,
    format: AsFormat = "text",
    storage: Storage = None,
    link: Link = Link(),  # noqa: B008
) -> None:
    """Show one virtual machine; as JSON it is an array of one.

    Example: lume get web --format json
    """
    with link.connect() as client:
        vm = client.get_vm(name, storage)
    _show_vms([vm], format)
    if format == "text":
        show_problems(vm)


def set_(
    name: VmName,
    /,
    *,
    cpu: int | None = None,
    memory: str | None = None,
    disk_size: Annotated[str | None, Parameter(help="the disk only grows")] = None,
    display: str | None = None,
    storage: Storage = None,
    no_backup: UnneededFlag = False,
    keep_backup: UnneededFlag = False,
    dry_run: Annotated[bool, Parameter(negative="", help="only say what would change")] = False,
    link: Link = Link(),  # noqa: B008
) -> None:
    """Change a stopped virtual machine.

    Example: lume set web --cpu 4 --memory 8GB --disk-size 100GB
    """
    changes = {"cpu": cpu, "memory": memory, "disk size": disk_size, "display": display}
    asked = {what: value for what, value in changes.items() if value is not None}
    with link.connect() as client:
        if dry_run or not asked:
            vm = client.get_vm(name, storage)
            now = {
                "cpu": str(vm.cpu),
                "memory": format_size(vm.memory_bytes),
                "disk size": format_size(vm.disk_total_bytes),
                "display": vm.display,
            }
            for what, value in asked.items():
                say(f"{what}: {now[what]}, would be {value}")
            if not asked:
                say("nothing to change: give --cpu, --memory, --disk-size or --display")
            return
        client.update_vm(
            name, cpu=cpu, memory=memory, disk_size=disk_size, display=display, storage=storage
        )
    say(f"{name} is changed")


def clone(
    name: VmName,
    new_name: str,
    /,
    *,
    source_storage: Storage = None,
    dest_storage: Storage = None,
    link: Link = Link(),  # noqa: B008
) -> None:
    """Make a virtual machine from a stopped one, independent of it.

    Example: lume clone web web2
    """
    with link.connect() as client:
        client.clone_vm(name, new_name, source_storage=source_storage, dest_storage=dest_storage)
    say(f"{new_name} is a clone of {name}")


def stop(
    name: VmName,
    /,
    *,
    force: Annotated[bool, Parameter(negative="", help="at once, disks flushed")] = False,
    storage: Storage = None,
    link: Link = Link(),  # noqa: B008
) -> None:
    """Shut a virtual machine down, and insist if it does not go: 20 seconds at most.

    Example: lume stop web
    """
    with link.connect() as client:
        vm = client.stop_vm(name, force=force, storage=storage)
    say_stopped(vm)


def shutdown(
    name: VmName,
    /,
    *,
    storage: Storage = None,
    login: _Login = _Login(),
    link: Link = Link(),  # noqa: B008
) -> None:
    """Shut a virtual machine down: the same as stop, which asks the guest first.

    Example: lume shutdown web
    """
    stop(name, storage=storage, link=link)


def restart(
    name: VmName,
    /,
    *,
    storage: Storage = None,
    login: _Login = _Login(),
    link: Link = Link(),  # noqa: B008
) -> None:
    """Shut a virtual machine down and run it again, with the same directories and disks.

    Example: lume restart web
    """
    from lumed.client.calls import Share

    with link.connect() as client:
        before = client.get_vm(name, storage)
        say_stopped(client.stop_vm(name, storage=storage))
        accepted = client.run_vm(
            name,
            shared_directories=[
                Share(share.host_path, share.read_only) for share in before.shared_directories
            ],
            network=before.network,
            recovery_mode=bool(before.raw.get("recoveryMode")),
            disks=before.raw.get("disks", ()),
            usb_storage=before.raw.get("usbStorage", ()),
            vnc="enabled" if before.vnc_port is not None else "disabled",
            storage=storage,
        )
        if accepted.operation is not None:
            follow(client, accepted.operation)
    say(f"{name} runs again")


def delete(
    name: VmName,
    /,
    *,
    force: Annotated[bool, Parameter(negative="", help="do not ask")] = False,
    storage: Storage = None,
    link: Link = Link(),  # noqa: B008
) -> None:
    """Delete a virtual machine and its disk; one that runs is stopped first.

    Example: lume delete web --force
    """
    with link.connect() as client:
        if not force:
            client.get_vm(name, storage)  # before the question
            if not confirm(f"Delete {name} and its disk?"):
                raise LumedError(f"{name} is not deleted")
        client.delete_vm(name, storage)
    say(f"{name} is deleted")


def confirm(question: str) -> bool:
    """Ask on the terminal. Raises LumedError where nobody could answer."""
    if not sys.stdin.isatty():
        raise LumedError(f"{question} Nobody can be asked here", hint="say it with --force")
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def absolute(path: str | None) -> str | None:
    """A path as the server can find it; a name or a reference stays as it is."""
    if path is None or not (path.startswith((".", "~", "/")) or Path(path).is_file()):
        return path
    return os.path.abspath(Path(path).expanduser())  # noqa: PTH100 - it also drops the ".."


def read_text(file: Path) -> str:
    """The text of a file. Raises LumedError."""
    try:
        return file.expanduser().read_text()
    except UnicodeDecodeError as error:
        raise LumedError(f"{file} is no text: {error.reason}") from error


def show_problems(vm: Vm) -> None:
    """What the server has to say about a VM."""
    for problem in vm.problems:
        say(f"{vm.name}: {problem}")
    if vm.last_end is not None and vm.state == "crashed":
        say(f"{vm.name} ended at {vm.last_end.at}: {vm.last_end.detail}")


def say_stopped(vm: Vm) -> None:
    """What ended a machine, if it was not the guest itself."""
    step = vm.last_end.step if vm.last_end is not None else None
    by_itself = step in (None, "power-button", "agent")
    say(f"{vm.name} is off" + ("" if by_itself else f" (ended by {step})"))


def _read_key(key: str) -> str:
    return key if key.startswith(("ssh-", "ecdsa-", "sk-")) else read_text(Path(key)).strip()


def _show_vms(vms: list[Vm], format: Format) -> None:
    if format == "text":
        show_table(_COLUMNS, vms)
    else:
        show_data([vm.raw for vm in vms], format)


def _state(vm: Vm) -> str:
    if vm.download_progress is not None:
        return f"{vm.state} {vm.download_progress:.0f}%"
    return vm.state


def _shares(vm: Vm) -> str:
    return ", ".join(
        share.host_path + (":ro" if share.read_only else "") for share in vm.shared_directories
    )


_COLUMNS: tuple[Column[Vm], ...] = (
    Column("NAME", lambda vm: vm.name),
    Column("STATUS", _state),
    Column("IP", lambda vm: vm.ip_address or "", 1),
    Column("OS", lambda vm: vm.os, 6),
    Column("CPU", lambda vm: str(vm.cpu), 3),
    Column("MEMORY", lambda vm: format_size(vm.memory_bytes), 3),
    Column(
        "DISK",
        lambda vm: (
            f"{describe_size(vm.disk_allocated_bytes)} of {format_size(vm.disk_total_bytes)}"
        ),
        4,
    ),
    Column("IMAGE", lambda vm: vm.image or "", 5),
    Column("DISPLAY", lambda vm: vm.display, 7),
    Column("NETWORK", lambda vm: vm.network, 7),
    Column("STORAGE", lambda vm: vm.location, 7),
    Column("SSH", lambda vm: {True: "yes", False: "no", None: ""}[vm.ssh_available], 7),
    Column("SHARED", _shares, 8),
    Column("VNC", lambda vm: vm.vnc_url or "", 9),
)
