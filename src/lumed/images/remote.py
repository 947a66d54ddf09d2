"""An image of a registry, fetched into the cache. Imported only once one is asked for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lumed.files import full_disk_is_no_space
from lumed.images.auth import Credentials
from lumed.images.blobs import BlobStream
from lumed.images.formats.plan import ImagePlan
from lumed.images.formats.recognise import find_config, plan_image
from lumed.images.local import Accept, BuiltImage, ImageCache, Report
from lumed.images.oci import Descriptor, Manifest
from lumed.images.pull import drop_blobs, pull_disk
from lumed.images.record import CachedImage
from lumed.images.reference import ImageReference
from lumed.images.registry import Registry
from lumed.model.image import ImageAbout
from lumed.model.vm import Architecture
from lumed.threads import in_loop

# This host's own processor first; a foreign guest runs in software emulation.
_ARCHITECTURES = (Architecture.AMD64, Architecture.ARM64)


async def fetch_image(
    cache: ImageCache,
    reference: ImageReference,
    credentials: Credentials | None,
    *,
    insecure: Collection[str],
    accept: Accept,
    report: Report,
) -> CachedImage:
    """The image that the registry has under that name now; only what is new is fetched.

    Raises RegistryFailed, NoSpace, InvalidField if its disk is not fit, and what accept does.
    An image that was cancelled or failed leaves the fetched part of its blobs in the cache, and
    the next fetch goes on there.
    """
    stop = threading.Event()
    with Registry(
        reference.registry, credentials=credentials, insecure=insecure, stop=stop
    ) as registry:
        look = partial(_look, registry, reference)
        manifest, plan = await cache.run_long(look, stop)
        about = _about(manifest, plan)
        await accept(about)
        tell = in_loop(partial(report, "pulling"))
        source = _Blobs(registry, reference.repository)

        async def fill(directory: Path) -> BuiltImage:
            pull = partial(_pull, source, plan, about, cache.blobs, directory, stop, tell)
            return await cache.run_long(pull, stop)

        image = await cache.get_or_make(_image_id(manifest), str(reference), fill)
    await asyncio.to_thread(_finish, cache, plan, reference, image)
    return image


def _look(registry: Registry, reference: ImageReference) -> tuple[Manifest, ImagePlan]:
    manifest = registry.get_manifest(reference, _ARCHITECTURES)
    config = registry.get_blob(reference.repository, find_config(manifest))
    return manifest, plan_image(manifest, config)


def _about(manifest: Manifest, plan: ImagePlan) -> ImageAbout:
    return ImageAbout(
        os=plan.os,
        architecture=Architecture(plan.architecture or Architecture.AMD64),
        digest=manifest.digest,
        cpu_count=plan.cpu_count,
        memory_bytes=plan.memory_bytes,
        display=plan.display,
    )


def _image_id(manifest: Manifest) -> str:
    return manifest.digest.replace(":", "-")


def _pull(
    source: _Blobs,
    plan: ImagePlan,
    about: ImageAbout,
    blobs: Path,
    directory: Path,
    stop: threading.Event,
    report: Callable[[int, int], None],
) -> BuiltImage:
    disk = directory / "disk"
    with full_disk_is_no_space(directory, "pull the image"):
        pull_disk(source, plan, blobs, disk, stop=stop, report=report)
    return BuiltImage(disk, about=about)


def _finish(
    cache: ImageCache, plan: ImagePlan, reference: ImageReference, image: CachedImage
) -> None:
    drop_blobs(plan, cache.blobs)
    cache.names.write(str(reference), image.id)


@dataclass(frozen=True, slots=True)
class _Blobs:
    """The blobs of one repository."""

    registry: Registry
    repository: str

    def get_blob(self, blob: Descriptor) -> bytes:
        return self.registry.get_blob(self.repository, blob)

    def open_blob(self, blob: Descriptor, offset: int) -> AbstractContextManager[BlobStream]:
        return self.registry.open_blob(self.repository, blob, offset)
