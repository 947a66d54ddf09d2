"""The JSON of the wire: request bodies, with every spelling that clients use.

Unknown keys are ignored, null means absent, and both `diskSize` and `disk_size` are understood
(contract, section 4).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
)

from lumed.errors import LumedError
from lumed.model.request import (
    BuildRequest,
    CloneRequest,
    CreateRequest,
    PullRequest,
    PushFormat,
    PushRequest,
    RunRequest,
    SettingsChange,
    ShareRequest,
    UpdateRequest,
)
from lumed.model.run import FIRST_VNC_PORT, VncMode
from lumed.model.vm import Display, Firmware, GuestOs, PortForward
from lumed.naming import check_location_name, check_vm_name
from lumed.units import MIB, TIB, parse_size

MAX_CPUS = 255
MIN_MEMORY, MAX_MEMORY = 64 * MIB, 4 * TIB
MIN_DISK, MAX_DISK = MIB, 64 * TIB
# What stands in a URL as it is (RFC 3986, section 2.3).
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]{1,64}")


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


def _no_truth_value(value: Any) -> Any:
    # Python's True is the number 1, and pydantic takes it for one.
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is no number")
    return value


def _vnc_port(value: int) -> int:
    if value and value < FIRST_VNC_PORT:
        raise ValueError(f"{value} is below {FIRST_VNC_PORT}; 0 is any free port")
    return value


def _vnc_password(value: str) -> str:
    if not _UNRESERVED.fullmatch(value):
        raise ValueError("it must be 1 to 64 letters, digits and . _ ~ -")
    return value


def _size_schema(example: str) -> WithJsonSchema:
    return WithJsonSchema(
        {
            "type": "string",
            "description": "A number and KB, MB, GB or TB; a bare number is GB.",
            "pattern": r"^\s*\d{1,20}(\.\d{1,20})?\s*([KMGTkmgt]?[Ii]?[Bb]?)\s*$",
            "examples": [example],
        }
    )


Text = Annotated[str, BeforeValidator(_text), Field(max_length=4096)]
Number = Annotated[int, BeforeValidator(_no_truth_value)]
Cpu = Annotated[Number, Field(ge=1, le=MAX_CPUS, description="Number of CPU cores", examples=[2])]
Memory = Annotated[
    int, BeforeValidator(_as_value_error(_size(MIN_MEMORY, MAX_MEMORY))), _size_schema("4GB")
]
DiskSize = Annotated[
    int, BeforeValidator(_as_value_error(_size(MIN_DISK, MAX_DISK))), _size_schema("64GB")
]
Screen = Annotated[
    Display,
    BeforeValidator(Display.parse),
    WithJsonSchema({"type": "string", "pattern": r"^\d{2,5}x\d{2,5}$", "examples": ["1024x768"]}),
]
Os = Annotated[
    GuestOs,
    BeforeValidator(_guest_os),
    WithJsonSchema(
        {
            "type": "string",
            "enum": ["macOS", "linux"],
            "description": "Guest OS, in any case of letters",
            "examples": ["linux"],
        }
    ),
]
VmName = Annotated[
    str,
    BeforeValidator(_as_value_error(check_vm_name)),
    WithJsonSchema(
        {
            "type": "string",
            "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
            "description": "Name of the VM",
            "examples": ["lume_vm"],
        }
    ),
]
LocationName = Annotated[
    str,
    BeforeValidator(_as_value_error(check_location_name)),
    WithJsonSchema({"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$", "examples": ["fast"]}),
]
VncPort = Annotated[
    Number,
    AfterValidator(_vnc_port),
    Field(le=65535, description="0 is any free one", examples=[5901]),
]
Storage = Annotated[
    Text | None,
    Field(description="A location's name (ssd, hdd, …) or an absolute path", examples=["ssd"]),
]


def _example(example: dict[str, Any]) -> ConfigDict:
    """An example of the API document, as /docs shows it."""
    return ConfigDict(json_schema_extra={"examples": [example]})


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", populate_by_name=True, arbitrary_types_allowed=True)


class PortBody(_Body):
    """A guest port to reach from the host."""

    guest_port: Number = Field(
        validation_alias=AliasChoices("guestPort", "guest_port", "guest"), ge=1, le=65535
    )
    host_port: Number | None = Field(
        None, validation_alias=AliasChoices("hostPort", "host_port", "host"), ge=1, le=65535
    )


def _port(value: Any) -> Any:
    return {"guestPort": value} if isinstance(value, int) else value


class CreateBody(_Body):
    """POST /lume/vms. image, network, userData, sshKeys, ports and firmware are lumed's own."""

    model_config = _example(
        {
            "name": "lume_vm",
            "os": "macOS",
            "cpu": 2,
            "memory": "4GB",
            "diskSize": "64GB",
            "display": "1024x768",
            "ipsw": "latest",
            "storage": "ssd",
        }
    )

    name: VmName
    os: Os
    cpu: Cpu
    memory: Memory
    disk_size: DiskSize = Field(validation_alias=AliasChoices("diskSize", "disk_size"))
    display: Screen | None = None
    ipsw: Text | None = Field(
        None, description="What to install: an image's name, or latest", examples=["latest"]
    )
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


class CloneBody(_Body):
    """POST /lume/vms/clone."""

    model_config = _example(
        {
            "name": "lume_vm",
            "newName": "lume_vm_copy",
            "sourceLocation": "ssd",
            "destLocation": "ssd",
        }
    )

    name: VmName
    new_name: VmName = Field(validation_alias=AliasChoices("newName", "new_name"))
    source_location: Storage = Field(
        None, validation_alias=AliasChoices("sourceLocation", "source_location")
    )
    dest_location: Storage = Field(
        None, validation_alias=AliasChoices("destLocation", "dest_location")
    )

    def to_request(self) -> CloneRequest:
        """The request in the engine's words."""
        return CloneRequest(
            name=self.name,
            new_name=self.new_name,
            source_location=self.source_location or None,
            dest_location=self.dest_location or None,
        )


class UpdateBody(_Body):
    """PUT or PATCH /lume/vms/{name}, POST …/update."""

    model_config = _example(
        {
            "cpu": 4,
            "memory": "8GB",
            "diskSize": "100GB",
            "display": "1920x1080",
            "storage": "ssd",
        }
    )

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

    model_config = _example(
        {
            "noDisplay": False,
            "sharedDirectories": [{"hostPath": "~/Projects", "readOnly": False}],
            "recoveryMode": False,
            "storage": "ssd",
        }
    )

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
    vnc_port: VncPort | None = Field(None, validation_alias=AliasChoices("vncPort", "vnc_port"))
    vnc_password: Annotated[str, AfterValidator(_vnc_password)] | None = Field(
        None,
        validation_alias=AliasChoices("vncPassword", "vnc_password"),
        description="Instead of a random one; VNC takes the first 8 letters",
    )
    disks: list[Text] | None = Field(
        None, max_length=16, description="Disk images of the host that the guest may write to"
    )
    usb_storage: list[Text] | None = Field(
        None,
        validation_alias=AliasChoices("usbStorage", "usb_storage"),
        max_length=16,
        description="Disk images of the host as read-only USB sticks",
    )

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
            vnc_port=self.vnc_port or None,
            vnc_password=self.vnc_password,
            disks=tuple(self.disks or ()),
            usb_storage=tuple(self.usb_storage or ()),
            storage=self.storage,
        )


class StopBody(_Body):
    """POST /lume/vms/{name}/stop; the body may be absent."""

    storage: Storage = None
    force: bool | None = Field(None, description="End the machine at once, disks flushed")


_Registry = Annotated[
    Text | None, Field(description="Registry host, perhaps with a port", examples=["ghcr.io"])
]
_Organization = Annotated[
    Text | None, Field(description="Organization name; empty for none", examples=["trycua"])
]


class PullBody(_Body):
    """POST /lume/images/pull, /lume/pull and /lume/pull/start."""

    model_config = _example(
        {
            "image": "macos-sequoia-vanilla:latest",
            "registry": "ghcr.io",
            "organization": "trycua",
            "storage": "ssd",
        }
    )

    image: Text = Field(
        description="name, name:tag or name@sha256:…", examples=["macos-sequoia-vanilla:latest"]
    )
    registry: _Registry = None
    organization: _Organization = None
    name: VmName | None = Field(None, description="Name of the VM; the image's if absent")
    storage: Storage = None
    username: Text | None = None
    password: Text | None = Field(None, repr=False)

    def to_request(self) -> PullRequest:
        """The request in the engine's words."""
        return PullRequest(
            image=self.image,
            registry=self.registry,
            organization=self.organization,
            name=self.name,
            storage=self.storage,
            username=self.username,
            password=self.password,
        )


class CancelPullBody(_Body):
    """POST /lume/pull/cancel."""

    name: Text


def _push_format(value: Any) -> Any:
    # KubeVirt writes containerDisk; people also write container-disk.
    return value.lower().replace("-", "").replace("_", "") if isinstance(value, str) else value


class PushBody(_Body):
    """POST /lume/vms/push; format, username and password are lumed's own."""

    name: VmName
    image_name: Text = Field(validation_alias=AliasChoices("imageName", "image_name"))
    tags: list[Text] = Field(min_length=1, max_length=64)
    registry: _Registry = None
    organization: _Organization = None
    storage: Storage = None
    chunk_size_mb: Number | None = Field(
        None, validation_alias=AliasChoices("chunkSizeMb", "chunk_size_mb"), ge=1, le=4096
    )
    single_layer: bool | None = Field(
        None, validation_alias=AliasChoices("singleLayer", "single_layer")
    )
    format: Annotated[PushFormat, BeforeValidator(_push_format)] | None = None
    username: Text | None = None
    password: Text | None = Field(None, repr=False)

    def to_request(self) -> PushRequest:
        """The request in the engine's words."""
        return PushRequest(
            name=self.name,
            image_name=self.image_name,
            tags=tuple(dict.fromkeys(self.tags)),
            registry=self.registry,
            organization=self.organization,
            storage=self.storage,
            chunk_bytes=(self.chunk_size_mb or 512) * MIB,
            single_layer=bool(self.single_layer),
            format=self.format or PushFormat.LUME,
            username=self.username,
            password=self.password,
        )


class BuildBody(_Body):
    """POST /lume/images/build."""

    image: Text = Field(description="What to build", examples=["debian:12"])
    packages: list[Text] | None = Field(None, max_length=1000)
    run: list[Text] | None = Field(
        None, max_length=100, description="Shell commands in the guest's file system"
    )

    def to_request(self) -> BuildRequest:
        """The request in the engine's words."""
        return BuildRequest(self.image, tuple(self.packages or ()), tuple(self.run or ()))


class PruneBody(_Body):
    """POST /lume/prune; the body may be absent."""

    dry_run: bool | None = Field(None, validation_alias=AliasChoices("dryRun", "dry_run"))


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
    registry: _Registry = None
    organization: _Organization = None

    def to_request(self) -> SettingsChange:
        """The request in the engine's words."""
        return SettingsChange(
            home_directory=self.home_directory,
            cache_directory=self.cache_directory,
            caching_enabled=self.caching_enabled,
            default_image=self.default_image,
            registry=self.registry,
            organization=self.organization,
        )


class LocationBody(_Body):
    """POST /lume/config/locations."""

    name: LocationName
    path: Text
