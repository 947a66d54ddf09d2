"""The JSON of the wire: the answers, as /openapi.json documents them; `shapes.py` writes them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


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
                    "name": "lume_vm",
                    "state": "stopped",
                    "os": "macOS",
                    "cpu": 2,
                    "memory": "4GB",
                    "diskSize": "64GB",
                    "display": "1024x768",
                    "ipAddress": "192.168.65.2",
                    "vncPort": 5900,
                    "sharedDirectories": [
                        {
                            "hostPath": "~/Projects",
                            "readOnly": False,
                            "tag": "com.apple.virtio-fs.automount",
                        }
                    ],
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
    guestAgent: bool | None = None  # noqa: N815
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
    architecture: str | None = None
    firmware: str | None = None
    accelerator: str | None = None
    createdAt: str | None = None  # noqa: N815
    startedAt: str | None = None  # noqa: N815
    recoveryMode: bool | None = None  # noqa: N815
    disks: list[str] | None = None
    usbStorage: list[str] | None = None  # noqa: N815


class VmReply(VmObject):
    """A VM object with a sentence that says what happened to it."""

    message: str


class CloneReply(VmReply):
    """The new VM, and the names of both."""

    source: str
    destination: str


class MessageReply(BaseModel):
    """A sentence that says what happened."""

    model_config = ConfigDict(extra="allow")

    message: str


class PlatformObject(BaseModel):
    """What runs an image."""

    os: str
    architecture: str


class ImageObject(BaseModel):
    """An image in the cache; the first two keys are Lume's. size is what it takes on the host."""

    repository: str
    imageId: str  # noqa: N815
    id: str
    name: str
    names: list[str]
    platform: PlatformObject
    format: str
    size: int
    virtualSize: int  # noqa: N815
    createdAt: str  # noqa: N815
    lastUsedAt: str  # noqa: N815
    vms: list[str]
    digest: str | None = None


class PushReply(BaseModel):
    """A push that has begun; `GET /lume/operations/{operation}` tells how it goes."""

    message: str
    name: str
    imageName: str  # noqa: N815
    tags: list[str]
    operation: str


class PruneReply(BaseModel):
    """What a prune removed, or would remove, and what it kept. Sizes in bytes."""

    message: str
    dryRun: bool  # noqa: N815
    removed: list[ImageObject]
    kept: list[ImageObject]
    freed: int


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
    result: str | None = None
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
    networkInterfaces: list[str]  # noqa: N815
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


class VmLogsObject(BaseModel):
    """A VM's logs of this run as text: the guest's serial console, and QEMU's own."""

    serial: str | None = None
    qemu: str | None = None


class LogsObject(BaseModel):
    """The server's logs as text."""

    info: str | None = None
    error: str | None = None
