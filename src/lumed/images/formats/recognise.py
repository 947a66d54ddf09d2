"""Which format an image has, told from its manifest."""

from __future__ import annotations

from lumed.errors import RegistryFailed
from lumed.images.formats.container import is_container, plan_container
from lumed.images.formats.legacy import find_legacy_config, is_legacy, plan_legacy
from lumed.images.formats.lume import is_lume, plan_lume
from lumed.images.formats.plan import ImagePlan
from lumed.images.formats.qemu import is_qemu, plan_qemu
from lumed.images.formats.tart import find_tart_config, is_tart, plan_tart
from lumed.images.oci import Descriptor, Manifest

_MAX_CONFIG_BYTES = 8 << 20  # some people keep documents in a container image's labels


def find_config(manifest: Manifest) -> Descriptor:
    """The blob whose content plan_image wants: the manifest's config, or a layer.

    Raises RegistryFailed if it is too large to be one.
    """
    config = manifest.config
    if is_tart(manifest):
        config = find_tart_config(manifest)
    elif is_legacy(manifest):
        config = find_legacy_config(manifest) or config
    if config.size_bytes > _MAX_CONFIG_BYTES:
        raise RegistryFailed(f"The image's config has {config.size_bytes} bytes; 8 MB are taken")
    return config


def plan_image(manifest: Manifest, config: bytes) -> ImagePlan:
    """How the image's disk is made; config is the content of find_config's blob.

    Raises RegistryFailed if the format is unknown or the manifest contradicts itself,
    NotPossibleHere if the guest or its disk is of a kind that cannot be run here.
    """
    if is_lume(manifest):
        return plan_lume(manifest, config)
    if is_qemu(manifest):
        return plan_qemu(manifest, config)
    if is_tart(manifest):
        return plan_tart(manifest, config)
    if is_legacy(manifest):
        return plan_legacy(manifest, config)
    if is_container(manifest):
        return plan_container(manifest, config)
    seen = {manifest.config.media_type, *(layer.media_type for layer in manifest.layers)}
    raise RegistryFailed(
        "The image is in no format that is known here; its media types are "
        + ", ".join(f"{media_type:.120}" for media_type in sorted(seen)[:8])
    )
