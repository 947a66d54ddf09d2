"""Which format an image has, told from its manifest."""

from __future__ import annotations

from lumed.errors import RegistryFailed
from lumed.images.formats import lume
from lumed.images.formats.plan import ImagePlan
from lumed.images.oci import Descriptor, Manifest


def find_config(manifest: Manifest) -> Descriptor:
    """The blob that plan_image wants as `config`: the manifest's own, or a layer for some."""
    return manifest.config


def plan_image(manifest: Manifest, config: bytes) -> ImagePlan:
    """How the image's disk is made; config is the content of find_config's blob.

    Raises RegistryFailed if the format is unknown or the manifest contradicts itself.
    """
    if lume.is_lume(manifest):
        return lume.plan_lume(manifest, config)
    seen = {manifest.config.media_type, *(layer.media_type for layer in manifest.layers)}
    raise RegistryFailed(
        "The image is in no format that is known here; its media types are "
        + ", ".join(f"{media_type:.120}" for media_type in sorted(seen)[:8])
    )
