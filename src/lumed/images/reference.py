"""Names of images in registries: registry host, repository, and a tag or a digest.

Grammar: the OCI distribution specification, "Pulling manifests", and the reference grammar that
all its tools share (a first part with a dot, a colon, or "localhost" is a registry's host).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lumed.errors import InvalidField

_HOST = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*"
    r"|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
)
_PART = re.compile(r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LONGEST_REPOSITORY = 255


@dataclass(frozen=True, slots=True)
class ImageReference:
    """Where an image lies; str() is its full name, with the registry's host.

    registry is "host" or "host:port". Exactly one of tag and digest is set.
    """

    registry: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    @property
    def name(self) -> str:
        """The last part of the repository, without tag."""
        return self.repository.rsplit("/", 1)[-1]

    @property
    def version(self) -> str:
        """What a registry's routes take: the digest or the tag."""
        return self.digest or self.tag or "latest"

    def __str__(self) -> str:
        mark = f"@{self.digest}" if self.digest else f":{self.tag}"
        return f"{self.registry}/{self.repository}{mark}"


def parse_reference(image: str, registry: str, organization: str = "") -> ImageReference:
    """The reference of `name`, `name:tag` or `name@sha256:…` in an organization of a registry.

    organization may be empty or have several parts; the tag is "latest" if there is none.
    Raises InvalidField that names the wrong one of image, registry and organization.
    """
    if not _HOST.fullmatch(registry):
        raise _refuse("registry", f"{registry!r:.80} is no host name, such as ghcr.io")
    name, tag, digest = _split(image)
    organization = organization.strip("/")
    for part in organization.split("/") if organization else ():
        if not _PART.fullmatch(part):
            raise _refuse("organization", _describe_part(part))
    for part in name.split("/"):
        if not _PART.fullmatch(part):
            raise _refuse("image", _describe_part(part))
    repository = f"{organization}/{name}" if organization else name
    if len(repository) > _LONGEST_REPOSITORY:
        raise _refuse("image", f"{repository!r:.80} has more than {_LONGEST_REPOSITORY} letters")
    return ImageReference(registry, repository, tag, digest)


def parse_full_reference(text: str) -> ImageReference | None:
    """The reference of `host/repository[:tag|@digest]`; None if the text names no host."""
    host, slash, rest = text.partition("/")
    if not slash or not ("." in host or ":" in host or host == "localhost"):
        return None
    if host in (".", "..") or not _HOST.fullmatch(host):
        return None  # a path
    return parse_reference(rest, host)


def _split(image: str) -> tuple[str, str | None, str | None]:
    name, at, digest = image.partition("@")
    if at:
        if not _DIGEST.fullmatch(digest):
            raise _refuse("image", f"{digest!r:.80} is no digest; it looks like sha256:<64 hex>")
        # name:tag@digest is what tools print; the digest decides.
        return name.rsplit(":", 1)[0] if ":" in name.rsplit("/", 1)[-1] else name, None, digest
    name, colon, tag = image.rpartition(":")
    if not colon:
        return image, "latest", None
    if not _TAG.fullmatch(tag):
        raise _refuse("image", f"{tag!r:.80} is no tag; it has letters, digits, '.', '_' and '-'")
    return name, tag, None


def _describe_part(part: str) -> str:
    return f"{part!r:.80} is no image name; it has small letters and digits, with '.', '_', '-'"


def _refuse(field: str, reason: str) -> InvalidField:
    return InvalidField(f"{field}: {reason}", fields={field: reason})
