"""Images: what is known about one beside its disk, and how it is seen through the API."""

from __future__ import annotations

from dataclasses import dataclass

from lumed.model.vm import Architecture, Display, GuestOs


@dataclass(frozen=True, slots=True)
class ImageAbout:
    """What an image says of itself; None where it does not say.

    digest is its manifest's ("sha256:<hex>"), for images that came from a registry.
    """

    os: GuestOs = GuestOs.LINUX
    architecture: Architecture = Architecture.AMD64
    digest: str | None = None
    cpu_count: int | None = None
    memory_bytes: int | None = None
    display: Display | None = None


@dataclass(frozen=True, slots=True)
class ImageView:
    """An image in the cache. names may be several tags; times are UTC (RFC 3339).

    allocated_bytes is what it takes on the host. vms rest on it; is_used is also true for VMs
    of other homes.
    """

    id: str
    names: tuple[str, ...]
    about: ImageAbout
    format: str
    virtual_size_bytes: int
    allocated_bytes: int
    created_at: str
    last_used_at: str
    vms: tuple[str, ...] = ()
    is_used: bool = False


@dataclass(frozen=True, slots=True)
class Pruned:
    """What a prune removed, or would remove; freed_bytes also counts unfinished downloads."""

    removed: tuple[ImageView, ...]
    kept: tuple[ImageView, ...]
    freed_bytes: int
