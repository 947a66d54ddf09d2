"""From the engine's words to the JSON of the wire (contract, sections 2 and 3)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

from fastapi import Response

from lumed import __version__
from lumed.model.host import HostStatus
from lumed.model.image import ImageView
from lumed.model.operation import Operation
from lumed.model.view import VmView
from lumed.model.vm import VmState
from lumed.units import format_size

VNC_HOST = "127.0.0.1"

# Whether the request came to the listener for today's clients (contract, section 3): the one
# thing that its answers differ in is `diskSize`. Set by that listener's guard.
speaks_compat: ContextVar[bool] = ContextVar("speaks_compat", default=False)


def json_response(value: object, status: int = 200) -> Response:
    """Compact JSON, as UTF-8."""
    body = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    # A lone surrogate (half of a pair, from an odd client) has no UTF-8; it is shown escaped.
    data = body.encode("utf-8", errors="backslashreplace")
    return Response(data, status, media_type="application/json")


def vm_object(vm: VmView) -> dict[str, Any]:
    """One VM: the document's keys and today's clients' keys. Unknown values are left out."""
    disk = {"allocated": vm.disk_allocated_bytes, "total": vm.disk_total_bytes}
    shape: dict[str, Any] = {
        "name": vm.name,
        "state": vm.state.value,
        "status": vm.state.value,
        "os": vm.os.value,
        "cpu": vm.cpu_count,
        "cpuCount": vm.cpu_count,
        "memory": format_size(vm.memory_bytes),
        "memorySize": vm.memory_bytes,
        "diskSize": disk if speaks_compat.get() else format_size(vm.disk_total_bytes),
        "disk": disk,
        "display": str(vm.display),
        "locationName": vm.location_name,
        "networkMode": vm.network,
        "sharedDirectories": [
            {"hostPath": share.host_path, "readOnly": share.read_only, "tag": share.tag}
            for share in vm.shared_directories
        ],
    }
    optional = {
        "ipAddress": vm.ip_address,
        "sshAvailable": vm.ssh_available,
        "guestAgent": vm.guest_agent or None,
        "vncPort": vm.vnc_port,
        "uuid": vm.uuid,
        "macAddress": vm.mac_address,
        "image": vm.image,
        "architecture": vm.architecture,
        "firmware": vm.firmware,
        "accelerator": vm.accelerator,
        "createdAt": vm.created_at,
        "startedAt": vm.started_at,
        "operation": vm.operation,
        "downloadProgress": vm.download_progress,
        "recoveryMode": vm.recovery_mode or None,
        "disks": [disk.path for disk in vm.disks] or None,
        "usbStorage": [disk.path for disk in vm.usb_storage] or None,
        "problems": list(vm.problems) or None,
    }
    shape |= {key: value for key, value in optional.items() if value is not None}
    if vm.vnc_port is not None and vm.vnc_password is not None:
        shape["vncUrl"] = f"vnc://:{vm.vnc_password}@{VNC_HOST}:{vm.vnc_port}"
    if vm.state in (VmState.PROVISIONING, VmState.PULLING):
        shape["provisioningOperation"] = vm.operation_action or "create"
    if vm.forwards:
        shape["forwards"] = [
            {
                "guestPort": forward.guest_port,
                "address": forward.address,
                "port": forward.port,
                "protocol": forward.protocol,
            }
            for forward in vm.forwards
        ]
    if vm.last_end is not None:
        shape["lastEnd"] = {"cause": vm.last_end.cause.value, "detail": vm.last_end.detail}
        shape["lastEnd"]["at"] = vm.last_end.at
        if vm.last_end.step is not None:
            shape["lastEnd"]["step"] = vm.last_end.step
    return shape


class VmListEncoder:
    """Encodes lists of VMs, each VM only when it has changed.

    The engine hands out the same object while nothing changes, so identity is enough. A list of
    2,000 would else cost 30 ms of the event loop.
    """

    def __init__(self) -> None:
        # For each of the two shapes: location and name, to the VM and its JSON.
        self._known: dict[bool, dict[tuple[str, str], tuple[VmView, bytes]]] = {}

    def response(self, vms: Iterable[VmView]) -> Response:
        """A JSON array."""
        compat = speaks_compat.get()
        all_known = self._known.setdefault(compat, {})
        fresh: dict[tuple[str, str], tuple[VmView, bytes]] = {}
        parts: list[bytes] = []
        for vm in vms:
            key = (vm.location_name, vm.name)
            known = all_known.get(key)
            if known is None or known[0] is not vm:
                known = (vm, bytes(json_response(vm_object(vm)).body))
            fresh[key] = known
            parts.append(known[1])
        all_known |= fresh
        if len(all_known) > 2 * len(fresh) + 64:
            self._known[compat] = fresh
        return Response(b"[" + b",".join(parts) + b"]", media_type="application/json")


def image_object(image: ImageView) -> dict[str, Any]:
    """An image; repository is its name without host, tag and digest, as Lume has it."""
    reference = image.names[0]
    host, slash, path = reference.partition("/")
    if slash and host and not reference.startswith(("/", "~")):
        path = path.partition("@")[0]
        repository = path.rpartition(":")[0] or path
    else:
        repository = reference
    shape: dict[str, Any] = {
        "repository": repository,
        "imageId": (image.about.digest or image.id).removeprefix("sha256:")[:12],
        "id": image.id,
        "name": image.names[0],
        "names": list(image.names),
        "platform": {"os": image.about.os.value, "architecture": image.about.architecture.value},
        "format": image.format,
        "size": image.allocated_bytes,
        "virtualSize": image.virtual_size_bytes,
        "createdAt": image.created_at,
        "lastUsedAt": image.last_used_at,
        "vms": list(image.vms),
    }
    if image.about.digest is not None:
        shape["digest"] = image.about.digest
    return shape


def operation_object(operation: Operation) -> dict[str, Any]:
    """One operation."""
    shape: dict[str, Any] = {
        "id": operation.id,
        "action": operation.action,
        "target": operation.target,
        "status": operation.status.value,
        "stage": operation.stage,
        "startedAt": operation.started_at,
    }
    optional = {
        "endedAt": operation.ended_at,
        "bytesDone": operation.bytes_done,
        "bytesTotal": operation.bytes_total,
        "result": operation.result,
    }
    shape |= {key: value for key, value in optional.items() if value is not None}
    if operation.error is not None:
        shape["failure"] = {"code": operation.error.code, "message": operation.error.message}
        if operation.error.hint is not None:
            shape["failure"]["hint"] = operation.error.hint
    return shape


def host_object(host: HostStatus) -> dict[str, Any]:
    """The host."""
    shape: dict[str, Any] = {
        "status": "healthy",
        "vm_count": host.vm_count,
        "max_vms": host.max_vms,
        "available_slots": max(0, host.max_vms - host.running_count),
        "version": __version__,
        "runningCount": host.running_count,
        "cpuCount": host.cpu_count,
        "memoryTotal": host.memory_total_bytes,
        "memoryAvailable": host.memory_available_bytes,
        "diskFree": host.disk_free_bytes,
        "networkInterfaces": list(host.network_interfaces),
    }
    if host.accelerator is not None:
        shape["accelerator"] = host.accelerator
        shape["acceleratorReason"] = host.accelerator_reason
    return shape
