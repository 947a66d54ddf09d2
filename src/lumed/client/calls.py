"""The API's verbs as data: what to send, how long to wait, what the answer is.

`Client` and `AsyncClient` carry the same calls out, so each verb is written once. All of them
raise the errors of `lumed.errors` by the code that the server answered: NotFound, AlreadyExists,
WrongState, Busy, InvalidField and so on; ServerUnreachable and OutcomeUnknown if no answer came.
See the server's /docs for the fields.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, ParamSpec, TypeVar
from urllib.parse import quote

from lumed.client import models
from lumed.client.models import Config, Host, Image, Location, Operation, Pruned, Vm

P = ParamSpec("P")
T = TypeVar("T")
# A number with KB, MB, GB or TB ("8GB", "1.5TB"), or bytes.
Size = str | int

_ANSWER_S = 30.0
_STOP_S = 60.0  # the server is over with a stop after 20 s
_CLONE_S = 120.0
LONGEST_WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request, and how its answer is read."""

    method: str
    path: str
    parse: Callable[[Any], T]
    params: Mapping[str, str | int] | None = None
    body: Mapping[str, object] | None = None
    timeout_s: float = _ANSWER_S
    is_json: bool = True


def describe(function: Callable[P, T], plan: Callable[P, Any]) -> Callable[P, T]:
    """The function with the name, the text and the parameters of the call, for help()."""
    functools.update_wrapper(function, plan, assigned=("__name__", "__qualname__", "__doc__"))
    function.__signature__ = inspect.signature(plan).replace(  # type: ignore[attr-defined]
        return_annotation=inspect.Signature.empty
    )
    return function


@dataclass(frozen=True, slots=True)
class Share:
    """A directory of the host to show to a guest; `~` is the server user's home."""

    host_path: str
    read_only: bool = False


def _given(**values: object) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _vm(name: str, *more: str) -> str:
    return "/".join(("/vms", quote(name, safe=""), *more))


def _nothing(_: Any) -> None:
    return None


# VMs


def list_vms(storage: str | None = None) -> Call[list[Vm]]:
    """All VMs in every state, sorted by name; or those of one location."""
    return Call("GET", "/vms", models.parse_vms, params=_given(storage=storage))


def get_vm(name: str, storage: str | None = None) -> Call[Vm]:
    """One VM. Raises NotFound, PullFailed if a pull should have made it."""
    return Call("GET", _vm(name), models.parse_vm, params=_given(storage=storage))


def create_vm(
    name: str,
    *,
    image: str | None = None,
    cpu: int = 2,
    memory: Size = "4GB",
    disk_size: Size = "20GB",
    os: str = "linux",
    display: str | None = None,
    storage: str | None = None,
    network: str | None = None,
    user_data: str | None = None,
    ssh_keys: Sequence[str] | None = None,
    ports: Sequence[int] | None = None,
    firmware: Literal["bios", "uefi"] | None = None,
    ipsw: str | None = None,
) -> Call[Vm]:
    """Begin to make a VM; `operation` of the answer is what to follow.

    image is a catalog name ("debian:12"), a reference, or a path; without it the disk is empty.
    """
    body = _given(
        name=name, os=os, cpu=cpu, memory=memory, diskSize=disk_size, display=display,
        image=image, ipsw=ipsw, storage=storage, network=network, userData=user_data,
        sshKeys=ssh_keys and list(ssh_keys), ports=ports and list(ports), firmware=firmware,
    )  # fmt: skip
    return Call("POST", "/vms", models.parse_vm, body=body)


def clone_vm(
    name: str,
    new_name: str,
    *,
    source_storage: str | None = None,
    dest_storage: str | None = None,
) -> Call[Vm]:
    """Make a VM from a stopped one, copy on write; it is there when this returns."""
    body = _given(
        name=name, newName=new_name, sourceLocation=source_storage, destLocation=dest_storage
    )
    return Call("POST", "/vms/clone", models.parse_vm, body=body, timeout_s=_CLONE_S)


def update_vm(
    name: str,
    *,
    cpu: int | None = None,
    memory: Size | None = None,
    disk_size: Size | None = None,
    display: str | None = None,
    storage: str | None = None,
) -> Call[Vm]:
    """Change a stopped VM; its disk only grows. Raises WrongState while it runs."""
    body = _given(cpu=cpu, memory=memory, diskSize=disk_size, display=display, storage=storage)
    return Call("PATCH", _vm(name), models.parse_vm, body=body)


def run_vm(
    name: str,
    *,
    shared_directories: Sequence[Share | str] = (),
    mount: str | None = None,
    network: str | None = None,
    vnc: Literal["enabled", "disabled"] | None = None,
    recovery_mode: bool = False,
    no_display: bool = True,
    disks: Sequence[str] = (),
    usb_storage: Sequence[str] = (),
    vnc_port: int | None = None,
    vnc_password: str | None = None,
    storage: str | None = None,
) -> Call[Vm]:
    """Begin to start a VM; all that can be checked was checked when this returns.

    no_display=False opens a viewer where the server has a desktop. disks and usb_storage are
    paths of disk images of the host; the guest writes to the former and only reads the latter.
    """
    shares = [Share(share) if isinstance(share, str) else share for share in shared_directories]
    body = _given(
        noDisplay=no_display,
        sharedDirectories=[{"hostPath": s.host_path, "readOnly": s.read_only} for s in shares],
        recoveryMode=recovery_mode,
        mount=mount,
        network=network,
        vnc=vnc,
        vncPort=vnc_port,
        vncPassword=vnc_password,
        disks=list(disks) or None,
        usbStorage=list(usb_storage) or None,
        storage=storage,
    )
    return Call("POST", _vm(name, "run"), models.parse_vm, body=body)


def stop_vm(name: str, *, force: bool = False, storage: str | None = None) -> Call[Vm]:
    """Stop a VM and wait until it is off, 20 s at most; force ends it at once, disks flushed."""
    body = _given(force=force, storage=storage)
    return Call("POST", _vm(name, "stop"), models.parse_vm, body=body, timeout_s=_STOP_S)


def delete_vm(name: str, storage: str | None = None) -> Call[None]:
    """Delete a VM; one that runs or is being made is stopped first."""
    return Call("DELETE", _vm(name), _nothing, params=_given(storage=storage), timeout_s=_STOP_S)


def screenshot(name: str, storage: str | None = None) -> Call[bytes]:
    """The screen of a running VM, as PNG."""
    return Call(
        "GET", _vm(name, "screenshot"), bytes, params=_given(storage=storage), is_json=False
    )


def vm_logs(
    name: str,
    *,
    type: Literal["serial", "qemu", "all"] = "all",
    lines: int | None = None,
    storage: str | None = None,
) -> Call[dict[str, str]]:
    """What the guest printed on its serial console, and what QEMU said, by those names."""
    params = _given(type=type, lines=lines, storage=storage)
    return Call("GET", _vm(name, "logs"), dict, params=params)


# Images


def pull_vm(
    image: str,
    name: str | None = None,
    *,
    registry: str | None = None,
    organization: str | None = None,
    storage: str | None = None,
    username: str | None = None,
    password: str | None = None,
) -> Call[Vm]:
    """Begin to make a VM from an image of a registry; `operation` is what to follow."""
    body = _given(
        image=image, name=name, registry=registry, organization=organization, storage=storage,
        username=username, password=password,
    )  # fmt: skip
    return Call("POST", "/pull/start", models.parse_vm, body=body)


def cancel_pull(name: str) -> Call[None]:
    """End the pull of a VM; its name is free when this returns."""
    return Call("POST", "/pull/cancel", _nothing, body={"name": name}, timeout_s=_STOP_S)


def push_vm(
    name: str,
    image: str,
    tags: Sequence[str],
    *,
    registry: str | None = None,
    organization: str | None = None,
    storage: str | None = None,
    chunk_size_mb: int | None = None,
    single_layer: bool | None = None,
    format: Literal["lume", "containerdisk"] | None = None,
    username: str | None = None,
    password: str | None = None,
) -> Call[str]:
    """Begin to send a stopped VM to a registry; returns the operation's id."""
    body = _given(
        name=name, imageName=image, tags=list(tags), registry=registry,
        organization=organization, storage=storage, chunkSizeMb=chunk_size_mb,
        singleLayer=single_layer, format=format, username=username, password=password,
    )  # fmt: skip
    return Call("POST", "/vms/push", lambda data: str(data["operation"]), body=body)


def build_image(
    image: str, *, packages: Sequence[str] = (), run: Sequence[str] = ()
) -> Call[Operation]:
    """Begin to build a Debian guest; run are shell commands in its file system."""
    body = {"image": image, "packages": list(packages), "run": list(run)}
    return Call("POST", "/images/build", models.parse_operation, body=body)


def list_images(organization: str | None = None) -> Call[list[Image]]:
    """The images in the cache, by name."""
    params = _given(organization=organization)
    return Call("GET", "/images", models.parse_images, params=params)


def delete_image(reference: str) -> Call[Image]:
    """Forget a name, and its image with the last one. Raises WrongState if a VM rests on it."""
    path = f"/images/{quote(reference, safe='/:@')}"
    return Call("DELETE", path, models.parse_image, timeout_s=_STOP_S)


def prune_images(*, dry_run: bool = False) -> Call[Pruned]:
    """Remove the images that nothing rests on; dry_run only tells which."""
    return Call("POST", "/prune", models.parse_pruned, body={"dryRun": dry_run}, timeout_s=_STOP_S)


# Operations


def list_operations() -> Call[list[Operation]]:
    """The operations still known, newest first."""
    return Call("GET", "/operations", models.parse_operations)


def get_operation(id: str, wait_s: float = 0) -> Call[Operation]:
    """One operation; wait_s (60 at most) is how long to wait for its end before answering."""
    return Call(
        "GET",
        f"/operations/{quote(id, safe='')}",
        models.parse_operation,
        params={"wait": f"{wait_s:g}"} if wait_s else None,
        timeout_s=wait_s + _ANSWER_S,
    )


def cancel_operation(id: str) -> Call[Operation]:
    """End an operation and wait until it has. Raises WrongState if it is over."""
    path = f"/operations/{quote(id, safe='')}/cancel"
    return Call("POST", path, models.parse_operation, timeout_s=_STOP_S)


# The host


def host_status() -> Call[Host]:
    """The host in numbers."""
    return Call("GET", "/host/status", models.parse_host)


def server_logs(
    type: Literal["info", "error", "all"] = "all", lines: int | None = None
) -> Call[dict[str, str]]:
    """The server's own logs, by kind."""
    return Call("GET", "/logs", dict, params=_given(type=type, lines=lines))


def get_config() -> Call[Config]:
    """The server's settings."""
    return Call("GET", "/config", models.parse_config)


def change_config(
    *,
    cache_directory: str | None = None,
    caching_enabled: bool | None = None,
    default_image: str | None = None,
    registry: str | None = None,
    organization: str | None = None,
) -> Call[None]:
    """Change and keep some settings."""
    body = _given(
        cacheDirectory=cache_directory, cachingEnabled=caching_enabled,
        defaultImage=default_image, registry=registry, organization=organization,
    )  # fmt: skip
    return Call("POST", "/config", _nothing, body=body)


def list_locations() -> Call[list[Location]]:
    """The storage locations."""
    return Call("GET", "/config/locations", models.parse_locations)


def add_location(name: str, path: str) -> Call[None]:
    """Configure a storage location. Raises AlreadyExists."""
    return Call("POST", "/config/locations", _nothing, body={"name": name, "path": path})


def remove_location(name: str) -> Call[None]:
    """Forget a storage location; its VMs stay on disk."""
    return Call("DELETE", f"/config/locations/{quote(name, safe='')}", _nothing)


def set_default_location(name: str) -> Call[None]:
    """Choose the location for requests that name none."""
    path = f"/config/locations/default/{quote(name, safe='')}"
    return Call("POST", path, _nothing)


# Streams, whose answers are read as they come


def plan_events(vm: str | None, resume: str | None) -> Call[None]:
    """What happens, as server-sent events."""
    params = _given(vm=vm, lastEventId=resume)
    return Call("GET", "/events", _nothing, params=params, is_json=False)


def plan_follow(logs: Call[dict[str, str]], type: str) -> Call[None]:
    """A log of that type, and what will be written to it."""
    params = {**(logs.params or {}), "type": type, "follow": "true"}
    return Call("GET", logs.path, _nothing, params=params, is_json=False)
