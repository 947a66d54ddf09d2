"""What the API answers, as plain typed objects; `raw` is the JSON object itself.

Sizes are bytes, times RFC 3339 in UTC. What the server does not know is None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Json = Mapping[str, Any]

# The states in which a machine of the VM exists.
_ALIVE = frozenset({"starting", "running", "paused", "stopping", "unresponsive"})
_IN_THE_MAKING = frozenset({"provisioning", "pulling"})


@dataclass(frozen=True, slots=True)
class SharedDirectory:
    """A directory of the host that a running guest sees under `tag`."""

    host_path: str
    read_only: bool
    tag: str


@dataclass(frozen=True, slots=True)
class Forward:
    """A host address and port that lead to a port of the guest."""

    guest_port: int
    address: str
    port: int
    protocol: str


@dataclass(frozen=True, slots=True)
class MachineEnd:
    """How the last machine of a VM ended; step is what ended it when it was asked to stop."""

    cause: str
    detail: str
    at: str
    step: str | None = None


@dataclass(frozen=True, slots=True)
class Vm:
    """One virtual machine."""

    name: str
    state: str
    os: str
    cpu: int
    memory_bytes: int
    disk_total_bytes: int
    disk_allocated_bytes: int
    display: str
    location: str
    network: str
    ip_address: str | None
    ssh_available: bool | None
    guest_agent: bool
    vnc_port: int | None
    vnc_url: str | None = field(repr=False)  # it holds the password
    shared_directories: tuple[SharedDirectory, ...]
    forwards: tuple[Forward, ...]
    problems: tuple[str, ...]
    last_end: MachineEnd | None
    uuid: str | None
    image: str | None
    operation: str | None
    download_progress: float | None
    raw: Json = field(repr=False, compare=False)

    @property
    def is_alive(self) -> bool:
        """Whether a machine of it exists, however it does."""
        return self.state in _ALIVE

    @property
    def is_in_the_making(self) -> bool:
        """Whether it is being created or pulled."""
        return self.state in _IN_THE_MAKING

    def find_forward(self, guest_port: int) -> tuple[str, int] | None:
        """The host address and port that lead to a TCP port of the guest."""
        for forward in self.forwards:
            if (forward.guest_port, forward.protocol) == (guest_port, "tcp"):
                return forward.address, forward.port
        # A bridged guest has an address of its own.
        if self.ip_address is not None and not self.forwards:
            return self.ip_address, guest_port
        return None


@dataclass(frozen=True, slots=True)
class Image:
    """An image in the cache; size_bytes is what it takes on the host."""

    name: str
    names: tuple[str, ...]
    id: str
    digest: str | None
    os: str
    architecture: str
    size_bytes: int
    virtual_size_bytes: int
    created_at: str
    last_used_at: str
    vms: tuple[str, ...]
    raw: Json = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Pruned:
    """What a prune removed (or would remove), and kept."""

    removed: tuple[Image, ...]
    kept: tuple[Image, ...]
    freed_bytes: int
    raw: Json = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class OperationFailure:
    """Why an operation failed."""

    code: str
    message: str
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Operation:
    """A long action. bytes_done and bytes_total are None where nothing is counted."""

    id: str
    action: str
    target: str
    status: str
    stage: str
    started_at: str
    ended_at: str | None
    bytes_done: int | None
    bytes_total: int | None
    result: str | None
    failure: OperationFailure | None
    raw: Json = field(repr=False, compare=False)

    @property
    def is_over(self) -> bool:
        """Whether it will not change any more."""
        return self.status != "running"


@dataclass(frozen=True, slots=True)
class Location:
    """A storage location."""

    name: str
    path: str


@dataclass(frozen=True, slots=True)
class Config:
    """The server's settings."""

    locations: tuple[Location, ...]
    default_location: str
    cache_directory: str | None
    caching_enabled: bool
    default_image: str
    registry: str
    organization: str
    raw: Json = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Host:
    """The host in numbers."""

    version: str
    vm_count: int
    running_count: int
    cpu_count: int
    memory_total_bytes: int
    memory_available_bytes: int
    disk_free_bytes: int
    accelerator: str | None
    network_interfaces: tuple[str, ...]
    raw: Json = field(repr=False, compare=False)


def parse_vm(data: Json) -> Vm:
    """A VM object of the API, from a listener of either diskSize shape."""
    disk, end = data["disk"], data.get("lastEnd")
    return Vm(
        name=data["name"],
        state=data["state"],
        os=data["os"],
        cpu=data["cpu"],
        memory_bytes=data["memorySize"],
        disk_total_bytes=disk["total"],
        disk_allocated_bytes=disk["allocated"],
        display=data["display"],
        location=data["locationName"],
        network=data["networkMode"],
        ip_address=data.get("ipAddress"),
        ssh_available=data.get("sshAvailable"),
        guest_agent=data.get("guestAgent", False),
        vnc_port=data.get("vncPort"),
        vnc_url=data.get("vncUrl"),
        shared_directories=tuple(
            SharedDirectory(share["hostPath"], share["readOnly"], share["tag"])
            for share in data.get("sharedDirectories", ())
        ),
        forwards=tuple(
            Forward(item["guestPort"], item["address"], item["port"], item["protocol"])
            for item in data.get("forwards", ())
        ),
        problems=tuple(data.get("problems", ())),
        last_end=end and MachineEnd(end["cause"], end["detail"], end["at"], end.get("step")),
        uuid=data.get("uuid"),
        image=data.get("image"),
        operation=data.get("operation"),
        download_progress=data.get("downloadProgress"),
        raw=data,
    )


def parse_vms(data: Sequence[Json]) -> list[Vm]:
    """A list of VM objects."""
    return [parse_vm(item) for item in data]


def parse_image(data: Json) -> Image:
    """An image object of the API."""
    return Image(
        name=data["name"],
        names=tuple(data["names"]),
        id=data["id"],
        digest=data.get("digest"),
        os=data["platform"]["os"],
        architecture=data["platform"]["architecture"],
        size_bytes=data["size"],
        virtual_size_bytes=data["virtualSize"],
        created_at=data["createdAt"],
        last_used_at=data["lastUsedAt"],
        vms=tuple(data["vms"]),
        raw=data,
    )


def parse_images(data: Sequence[Json]) -> list[Image]:
    """A list of image objects."""
    return [parse_image(item) for item in data]


def parse_pruned(data: Json) -> Pruned:
    """The answer of a prune."""
    removed, kept = (tuple(parse_images(data[key])) for key in ("removed", "kept"))
    return Pruned(removed, kept, data["freed"], data)


def parse_operation(data: Json) -> Operation:
    """An operation object of the API."""
    failure = data.get("failure")
    return Operation(
        id=data["id"],
        action=data["action"],
        target=data["target"],
        status=data["status"],
        stage=data["stage"],
        started_at=data["startedAt"],
        ended_at=data.get("endedAt"),
        bytes_done=data.get("bytesDone"),
        bytes_total=data.get("bytesTotal"),
        result=data.get("result"),
        failure=failure
        and OperationFailure(failure["code"], failure["message"], failure.get("hint")),
        raw=data,
    )


def parse_operations(data: Sequence[Json]) -> list[Operation]:
    """A list of operation objects."""
    return [parse_operation(item) for item in data]


def parse_locations(data: Sequence[Json]) -> list[Location]:
    """A list of locations."""
    return [Location(item["name"], item["path"]) for item in data]


def parse_config(data: Json) -> Config:
    """The settings."""
    registry = data["registry"]["ghcr"]
    return Config(
        locations=tuple(parse_locations(data["vmLocations"])),
        default_location=data["defaultLocationName"],
        cache_directory=data["cacheDirectory"],
        caching_enabled=data["cachingEnabled"],
        default_image=data["defaultImage"],
        registry=registry["registry"],
        organization=registry["organization"],
        raw=data,
    )


def parse_host(data: Json) -> Host:
    """The host."""
    return Host(
        version=data["version"],
        vm_count=data["vm_count"],
        running_count=data["runningCount"],
        cpu_count=data["cpuCount"],
        memory_total_bytes=data["memoryTotal"],
        memory_available_bytes=data["memoryAvailable"],
        disk_free_bytes=data["diskFree"],
        accelerator=data.get("accelerator"),
        network_interfaces=tuple(data["networkInterfaces"]),
        raw=data,
    )
