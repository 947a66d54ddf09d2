"""The JSON of the wire: request bodies with every spelling that clients use, and the answers.

Unknown keys are ignored, null means absent, and both `diskSize` and `disk_size` are understood
(contract, section 4). The answers here document the API; `shapes.py` writes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from lumed.errors import LumedError
from lumed.model.request import CreateRequest, RunRequest, ShareRequest, UpdateRequest
from lumed.model.run import VncMode
from lumed.model.vm import Display, Firmware, GuestOs, PortForward
from lumed.naming import check_location_name, check_vm_name
from lumed.units import MIB, TIB, parse_size

MAX_CPUS = 255
MIN_MEMORY, MAX_MEMORY = 64 * MIB, 4 * TIB
MIN_DISK, MAX_DISK = MIB, 64 * TIB


def _as_value_error(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Our parsers raise InvalidField; pydantic collects ValueError."""

    def checked(value: Any) -> Any:
        try:
            return parse(value)
        except LumedError as error:
            raise ValueError(next(iter(error.fields.values()), error.message)) from error

    return checked


def _size(low: int, high: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        size = parse_size(value, "size")
        if not low <= size <= high:
            raise ValueError(f"{value!r:.60} is out of range: {low // MIB}MB to {high // TIB}TB")
        # QEMU's memory and disks come in whole megabytes.
        return -(-size // MIB) * MIB

    return parse


def _guest_os(value: Any) -> GuestOs:
    words = {"macos": GuestOs.MACOS, "darwin": GuestOs.MACOS, "linux": GuestOs.LINUX}
    if not isinstance(value, str) or value.lower() not in words:
        raise ValueError(f"{value!r:.60} is not supported; use linux")
    return words[value.lower()]


def _text(value: Any) -> Any:
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("it holds a NUL character")
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            # JSON can write it, but no file name and no UTF-8 can hold it.
            raise ValueError("it holds half of a surrogate pair")
    return value


def _size_schema(example: str) -> WithJsonSchema:
    return WithJsonSchema(
        {
            "type": "string",
            "description": "A number and KB, MB, GB or TB; a bare number is GB.",
            "examples": [example],
        }
    )


Text = Annotated[str, BeforeValidator(_text), Field(max_length=4096)]
Cpu = Annotated[int, Field(ge=1, le=MAX_CPUS, description="Number of CPU cores", examples=[2])]
Memory = Annotated[
    int, BeforeValidator(_as_value_error(_size(MIN_MEMORY, MAX_MEMORY))), _size_schema("4GB")
]
DiskSize = Annotated[
    int, BeforeValidator(_as_value_error(_size(MIN_DISK, MAX_DISK))), _size_schema("64GB")
]
Screen = Annotated[
    Display,
    BeforeValidator(Display.parse),
    WithJsonSchema({"type": "string", "examples": ["1024x768"]}),
]
Os = Annotated[
    GuestOs,
    BeforeValidator(_guest_os),
    WithJsonSchema({"type": "string", "examples": ["linux"], "description": "macOS or linux"}),
]
VmName = Annotated[
    str,
    BeforeValidator(_as_value_error(check_vm_name)),
    WithJsonSchema({"type": "string", "examples": ["lume_vm"]}),
]
LocationName = Annotated[
    str,
    BeforeValidator(_as_value_error(check_location_name)),
    WithJsonSchema({"type": "string", "examples": ["fast"]}),
]
Storage = Annotated[
    Text | None,
    Field(description="A location's name (ssd, hdd, …) or an absolute path", examples=["ssd"]),
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", populate_by_name=True, arbitrary_types_allowed=True)


class PortBody(_Body):
    """A guest port to reach from the host."""

    guest_port: int = Field(
        validation_alias=AliasChoices("guestPort", "guest_port", "guest"), ge=1, le=65535
    )
    host_port: int | None = Field(
        None, validation_alias=AliasChoices("hostPort", "host_port", "host"), ge=1, le=65535
    )


def _port(value: Any) -> Any:
    return {"guestPort": value} if isinstance(value, int) else value


class CreateBody(_Body):
    """POST /lume/vms. image, network, userData, sshKeys, ports and firmware are lumed's own."""

    name: VmName
    os: Os
    cpu: Cpu
    memory: Memory
    disk_size: DiskSize = Field(validation_alias=AliasChoices("diskSize", "disk_size"))
    display: Screen | None = None
    ipsw: Text | None = Field(None, description="What to install: an image's name, or latest")
    storage: Storage = None
    image: Text | None = Field(None, description="An image's name (tiny) or path")
    network: Text | None = Field(None, examples=["nat"])
    user_data: Annotated[str, BeforeValidator(_text), Field(max_length=1024 * 1024)] | None = Field(
        None,
        validation_alias=AliasChoices("userData", "user_data"),
        description="cloud-init user data",
    )
    ssh_keys: list[Text] | None = Field(
        None, validation_alias=AliasChoices("sshKeys", "ssh_keys"), max_length=100
    )
    ports: list[Annotated[PortBody, BeforeValidator(_port)]] | None = Field(None, max_length=64)
    firmware: Firmware | None = None

    def to_request(self) -> CreateRequest:
        """The request in the engine's words."""
        return CreateRequest(
            name=self.name,
            os=self.os,
            cpu_count=self.cpu,
            memory_bytes=self.memory,
            disk_size_bytes=self.disk_size,
            display=self.display or Display(),
            image=self.image,
            ipsw=self.ipsw,
            storage=self.storage,
            network=self.network or "nat",
            user_data=self.user_data,
            ssh_keys=tuple(self.ssh_keys or ()),
            ports=tuple(PortForward(p.guest_port, p.host_port) for p in self.ports or ()),
            firmware=self.firmware,
        )


class UpdateBody(_Body):
    """PUT or PATCH /lume/vms/{name}, POST …/update."""

    cpu: Cpu | None = None
    memory: Memory | None = None
    disk_size: DiskSize | None = Field(None, validation_alias=AliasChoices("diskSize", "disk_size"))
    display: Screen | None = None
    storage: Storage = None

    def to_request(self) -> UpdateRequest:
        """The request in the engine's words."""
        return UpdateRequest(
            cpu_count=self.cpu,
            memory_bytes=self.memory,
            disk_size_bytes=self.disk_size,
            display=self.display,
            storage=self.storage,
        )


class SharedDirectoryBody(_Body):
    """A directory of the host that the guest shall see."""

    host_path: Text = Field(
        validation_alias=AliasChoices("hostPath", "host_path"), examples=["~/Projects"]
    )
    read_only: bool = Field(False, validation_alias=AliasChoices("readOnly", "read_only"))


class RunBody(_Body):
    """POST /lume/vms/{name}/run; every field may be absent."""

    no_display: bool | None = Field(None, validation_alias=AliasChoices("noDisplay", "no_display"))
    shared_directories: list[SharedDirectoryBody] | None = Field(
        None,
        validation_alias=AliasChoices("sharedDirectories", "shared_directories"),
        max_length=16,
    )
    recovery_mode: bool | None = Field(
        None, validation_alias=AliasChoices("recoveryMode", "recovery_mode")
    )
    storage: Storage = None
    mount: Text | None = Field(None, description="An ISO to attach and boot from")
    network: Text | None = None
    vnc: VncMode | None = None

    def to_request(self) -> RunRequest:
        """The request in the engine's words."""
        return RunRequest(
            no_display=bool(self.no_display),
            shared_directories=tuple(
                ShareRequest(share.host_path, share.read_only)
                for share in self.shared_directories or ()
            ),
            recovery_mode=bool(self.recovery_mode),
            mount=self.mount,
            network=self.network,
            vnc=self.vnc or VncMode.ENABLED,
            storage=self.storage,
        )


class StopBody(_Body):
    """POST /lume/vms/{name}/stop; the body may be absent."""

    storage: Storage = None
    force: bool | None = Field(None, description="End the machine at once, disks flushed")


class ConfigBody(_Body):
    """POST /lume/config."""

    home_directory: Text | None = Field(
        None, validation_alias=AliasChoices("homeDirectory", "home_directory")
    )
    cache_directory: Text | None = Field(
        None, validation_alias=AliasChoices("cacheDirectory", "cache_directory")
    )
    caching_enabled: bool | None = Field(
        None, validation_alias=AliasChoices("cachingEnabled", "caching_enabled")
    )
    default_image: Text | None = Field(
        None, validation_alias=AliasChoices("defaultImage", "default_image")
    )


class LocationBody(_Body):
    """POST /lume/config/locations."""

    name: LocationName
    path: Text


class ErrorObject(BaseModel):
    """Every failure. message and error hold the same sentence."""

    message: str
    error: str
    code: str
    hint: str | None = None
    fields: dict[str, Any] | None = None


class DiskObject(BaseModel):
    """Bytes on the host, and the size that the guest sees."""

    allocated: int
    total: int


class SharedDirectoryObject(BaseModel):
    """A shared directory of a running VM; tag is its name inside the guest."""

    hostPath: str  # noqa: N815 - the wire's names
    readOnly: bool  # noqa: N815
    tag: str


class ForwardObject(BaseModel):
    """A host address and port that lead to a guest port."""

    guestPort: int  # noqa: N815
    address: str
    port: int
    protocol: str


class EndObject(BaseModel):
    """How the last machine ended; step is what ended it when it was asked to stop."""

    cause: str
    detail: str
    at: str
    step: str | None = None


class VmObject(BaseModel):
    """A VM: the document's keys and today's clients' keys side by side.

    An ipAddress, vncPort or vncUrl that is not known is absent.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "name": "my-vm-2",
                    "state": "stopped",
                    "os": "linux",
                    "cpu": 2,
                    "memory": "4GB",
                    "diskSize": "64GB",
                }
            ]
        }
    )

    name: str
    state: str
    status: str
    os: str
    cpu: int
    cpuCount: int  # noqa: N815
    memory: str
    memorySize: int  # noqa: N815
    diskSize: str  # noqa: N815
    disk: DiskObject
    display: str
    locationName: str  # noqa: N815
    networkMode: str  # noqa: N815
    ipAddress: str | None = None  # noqa: N815
    sshAvailable: bool | None = None  # noqa: N815
    vncPort: int | None = None  # noqa: N815
    vncUrl: str | None = None  # noqa: N815
    sharedDirectories: list[SharedDirectoryObject] | None = None  # noqa: N815
    forwards: list[ForwardObject] | None = None
    problems: list[str] | None = None
    lastEnd: EndObject | None = None  # noqa: N815
    operation: str | None = None
    provisioningOperation: str | None = None  # noqa: N815
    downloadProgress: float | None = None  # noqa: N815
    uuid: str | None = None
    macAddress: str | None = None  # noqa: N815
    image: str | None = None
    firmware: str | None = None
    accelerator: str | None = None
    createdAt: str | None = None  # noqa: N815
    startedAt: str | None = None  # noqa: N815
    recoveryMode: bool | None = None  # noqa: N815


class VmReply(VmObject):
    """A VM object with a sentence that says what happened to it."""

    message: str


class MessageReply(BaseModel):
    """A sentence that says what happened."""

    model_config = ConfigDict(extra="allow")

    message: str


class OperationErrorObject(BaseModel):
    """Why an operation failed."""

    code: str
    message: str
    hint: str | None = None


class OperationObject(BaseModel):
    """A long action. `failure` rather than `error`: one client takes the key for a failed call."""

    id: str
    action: str
    target: str
    status: str
    stage: str
    startedAt: str  # noqa: N815
    endedAt: str | None = None  # noqa: N815
    bytesDone: int | None = None  # noqa: N815
    bytesTotal: int | None = None  # noqa: N815
    failure: OperationErrorObject | None = None


class HostObject(BaseModel):
    """The host in numbers; the first five keys are Lume's."""

    status: str
    vm_count: int
    max_vms: int
    available_slots: int
    version: str
    runningCount: int  # noqa: N815
    cpuCount: int  # noqa: N815
    memoryTotal: int  # noqa: N815
    memoryAvailable: int  # noqa: N815
    diskFree: int  # noqa: N815
    accelerator: str | None = None
    acceleratorReason: str | None = None  # noqa: N815


class LocationObject(BaseModel):
    """A storage location."""

    name: str
    path: str


class ConfigObject(BaseModel):
    """The settings in force."""

    vmLocations: list[LocationObject]  # noqa: N815
    defaultLocationName: str  # noqa: N815
    cacheDirectory: str  # noqa: N815
    cachingEnabled: bool  # noqa: N815
    telemetryEnabled: bool  # noqa: N815
    defaultImage: str  # noqa: N815
    registry: dict[str, Any]


class LogsObject(BaseModel):
    """The server's logs as text."""

    info: str | None = None
    error: str | None = None
