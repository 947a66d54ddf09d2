"""What a caller asks of the engine; shapes and ranges are checked, the world is not yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from lumed.model.run import VncMode
from lumed.model.vm import Display, Firmware, GuestOs, PortForward


@dataclass(frozen=True, slots=True)
class CreateRequest:
    """A VM to be made. image None is an empty disk, unless installs names one (`ipsw`)."""

    name: str
    os: GuestOs
    cpu_count: int
    memory_bytes: int
    disk_size_bytes: int
    display: Display = field(default_factory=Display)
    image: str | None = None
    ipsw: str | None = None
    storage: str | None = None
    network: str = "nat"
    user_data: str | None = None
    ssh_keys: tuple[str, ...] = ()
    ports: tuple[PortForward, ...] = ()
    firmware: Firmware | None = None


@dataclass(frozen=True, slots=True)
class UpdateRequest:
    """What to change; None leaves a setting as it is."""

    cpu_count: int | None = None
    memory_bytes: int | None = None
    disk_size_bytes: int | None = None
    display: Display | None = None
    storage: str | None = None


@dataclass(frozen=True, slots=True)
class CloneRequest:
    """A VM to be made from another; a location None is where it is found, or the default."""

    name: str
    new_name: str
    source_location: str | None = None
    dest_location: str | None = None


@dataclass(frozen=True, slots=True)
class ShareRequest:
    """A directory to share, as it was written: `~` and links are not resolved yet."""

    host_path: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class RunRequest:
    """How to run a VM. network None is the VM's own.

    disks and usb_storage: paths of disk images as they were written, the latter read-only.
    vnc_port None is any free one, vnc_password None a new one.
    """

    no_display: bool = True
    shared_directories: tuple[ShareRequest, ...] = ()
    recovery_mode: bool = False
    mount: str | None = None
    network: str | None = None
    vnc: VncMode = VncMode.ENABLED
    vnc_port: int | None = None
    vnc_password: str | None = field(default=None, repr=False)
    disks: tuple[str, ...] = ()
    usb_storage: tuple[str, ...] = ()
    storage: str | None = None


@dataclass(frozen=True, slots=True)
class PullRequest:
    """An image to be fetched, and the VM to be made from it.

    image is `name`, `name:tag` or `name@sha256:…`; registry and organization None are the
    configured ones, an organization "" is none. The VM's name None is the image's, without tag.
    """

    image: str
    registry: str | None = None
    organization: str | None = None
    name: str | None = None
    storage: str | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)


class PushFormat(StrEnum):
    """How an image lies in a registry: as Lume reads it, or as KubeVirt does."""

    LUME = "lume"
    CONTAINER_DISK = "containerdisk"


@dataclass(frozen=True, slots=True)
class PushRequest:
    """A stopped VM to be sent to a registry, under each of `tags`. chunk_bytes: Lume's slices."""

    name: str
    image_name: str
    tags: tuple[str, ...]
    registry: str | None = None
    organization: str | None = None
    storage: str | None = None
    chunk_bytes: int = 512 << 20
    single_layer: bool = False
    format: PushFormat = PushFormat.LUME
    username: str | None = None
    password: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """A guest image to be built here: `debian:12` with more packages, then commands in it."""

    image: str
    packages: tuple[str, ...] = ()
    run: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SettingsChange:
    """What to change in the settings; None stays. An empty organization is none at all."""

    home_directory: str | None = None
    cache_directory: str | None = None
    caching_enabled: bool | None = None
    default_image: str | None = None
    registry: str | None = None
    organization: str | None = None
