"""The catalog: names such as `debian:12`, and where the vendor has the image and its sums.

`catalog.yaml` beside this file, then the user's own in the same form. What a vendor publishes
under a name changes; the name in the cache stays with the image that was fetched first, until
that is removed.
"""

from __future__ import annotations

import asyncio
import difflib
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from lumed.errors import Damaged, InvalidField, NotPossibleHere, RegistryFailed
from lumed.images.download import VendorSum, download, fetch_text
from lumed.images.local import BuiltImage, ImageCache, Report
from lumed.images.record import CachedImage
from lumed.model.image import ImageAbout
from lumed.model.vm import Architecture
from lumed.threads import in_loop

_BUILT_IN = Path(__file__).with_name("catalog.yaml")
_MACHINES = {Architecture.AMD64: "x86_64", Architecture.ARM64: "aarch64"}
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}(:[A-Za-z0-9._-]{1,64})?")
_ALGORITHMS = {64: "sha256", 128: "sha512"}
# "<hex> *name" and "<hex>  name" (sha256sum(1)), "SHA256 (name) = <hex>" (its --tag).
_PLAIN_LINE = re.compile(r"([0-9a-fA-F]{64,128})(?:\s+\*?(\S+))?")
_TAGGED_LINE = re.compile(r"SHA(?:256|512) \((.+)\) = ([0-9a-fA-F]{64,128})")
_SUMS_LIMIT = 4 << 20


@dataclass(frozen=True, slots=True)
class VendorImage:
    """Where one image is. url and sums_url are absolute; name is the catalog's, no alias."""

    name: str
    architecture: Architecture
    url: str
    sums_url: str

    @property
    def file(self) -> str:
        """The file's name at the vendor, as the list of sums has it."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class Catalog:
    """All images by name and architecture, and other names for them."""

    images: Mapping[str, Mapping[Architecture, VendorImage]]
    aliases: Mapping[str, str]

    @property
    def names(self) -> list[str]:
        """Every name, sorted; no aliases."""
        return sorted(self.images)

    def find_close(self, name: str) -> list[str]:
        """Up to three names and aliases that somebody may have meant."""
        known = [*self.names, *sorted(self.aliases)]
        return difflib.get_close_matches(name, known, n=3, cutoff=0.5)

    def knows(self, name: str) -> bool:
        """Whether get() would find the name."""
        return self.aliases.get(name, name) in self.images

    def get(self, name: str, architecture: Architecture) -> VendorImage:
        """The image of that name or alias.

        Raises InvalidField (image) that lists close matches, NotPossibleHere if the vendor has
        it for other processors only.
        """
        found = self.images.get(self.aliases.get(name, name))
        if found is None:
            close = self.find_close(name) or self.names
            reason = f"{name!r:.100} is in no catalog"
            raise InvalidField(
                f"image {reason}", hint=f"known are {', '.join(close)}", fields={"image": reason}
            )
        image = found.get(architecture)
        if image is None:
            raise NotPossibleHere(f"The image {name} is there for {', '.join(found)} only")
        return image


async def get_vendor_image(cache: ImageCache, image: VendorImage, report: Report) -> CachedImage:
    """The image from the cache under its name, or fetched, verified and put there.

    Raises RegistryFailed if the mirror fails, has no sum for the file or sends other bytes,
    InvalidField if what it sends is no fit disk, NoSpace. What was fetched before a failure or a
    kill is used by the next try.
    """
    name = _cache_name(image)
    found = await asyncio.to_thread(cache.find_named, name)
    if found is not None:
        return found
    stop = threading.Event()
    tell = in_loop(partial(report, "downloading"))
    wanted = await cache.run_long(partial(read_vendor_sum, image, stop), stop)

    async def fill(directory: Path) -> BuiltImage:
        disk = directory / "disk"
        fetch = partial(download, image.url, wanted, cache.blobs, disk, stop=stop, report=tell)
        await cache.run_long(fetch, stop)
        return BuiltImage(disk, about=ImageAbout(architecture=image.architecture))

    made = await cache.get_or_make(f"vendor-{wanted.hex[:24]}", name, fill)
    await asyncio.to_thread(cache.names.write, name, made.id)
    return made


def _cache_name(image: VendorImage) -> str:
    # The host's own kind has the plain name; two kinds of one name are two images.
    if image.architecture is Architecture.AMD64:
        return image.name
    return f"{image.name} ({image.architecture})"


def read_vendor_sum(image: VendorImage, stop: threading.Event) -> VendorSum:
    """What the vendor says the file's sum is. Blocking; raises RegistryFailed, Stopped."""
    return find_sum(fetch_text(image.sums_url, _SUMS_LIMIT, stop=stop), image)


def find_sum(text: str, image: VendorImage) -> VendorSum:
    """The sum of the image's file in a vendor's list, whose form is found by looking.

    Raises RegistryFailed if the list does not name the file, or names two sums for it.
    """
    found: set[str] = set()
    alone: list[str] = []
    for line in map(str.strip, text.splitlines()):
        if tagged := _TAGGED_LINE.fullmatch(line):
            name, digest = tagged[1], tagged[2]
        elif plain := _PLAIN_LINE.fullmatch(line):
            name, digest = plain[2] or "", plain[1]
        else:
            continue
        if len(digest) not in _ALGORITHMS:
            continue
        if name.removeprefix("./") == image.file:
            found.add(digest.lower())
        elif not name:
            alone.append(digest.lower())
    if not found and len(alone) == 1 and image.sums_url.rpartition("/")[2].startswith(image.file):
        found.update(alone)  # a file that holds nothing but the sum of the one it is named after
    if len(found) != 1:
        told = "names several sums for" if found else "does not name"
        raise RegistryFailed(
            f"{image.sums_url} {told} {image.file}, so the image cannot be checked",
            hint="is the mirror complete, and the catalog's entry up to date?",
        )
    digest = found.pop()
    return VendorSum(_ALGORITHMS[len(digest)], digest)


def read_catalog(extra: Path | None = None, mirrors: Mapping[str, str] | None = None) -> Catalog:
    """The built-in catalog with the user's file over it, if there is one. Blocking.

    mirrors: other URLs for the mirrors' names, from the settings. Raises Damaged, with the
    entry, for a file that cannot be understood.
    """
    content = _read(_BUILT_IN)
    if extra is not None and extra.exists():
        theirs = _read(extra)
        content = {key: content[key] | theirs[key] for key in content}
    content["mirrors"] |= dict(mirrors or {})
    try:
        images = {name: _parse(name, entry, content) for name, entry in content["images"].items()}
        aliases = {str(name): str(to) for name, to in content["aliases"].items()}
        for name, to in aliases.items():
            if to not in images:
                raise ValueError(f"the alias {name} leads to {to}, which is no image")
    except ValueError as error:
        raise _damaged(extra or _BUILT_IN, str(error)) from error
    return Catalog(images, aliases)


def _read(path: Path) -> dict[str, dict[str, object]]:
    # Imported here: the server reads no catalog before an image of it is asked for.
    import yaml

    try:
        content = yaml.safe_load(path.read_bytes()) or {}
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise _damaged(path, " ".join(str(error).split())) from error
    if not isinstance(content, dict):
        raise _damaged(path, "it is no mapping")
    known = ("mirrors", "images", "aliases")
    if strange := set(content) - set(known):
        raise _damaged(path, f"it has {', '.join(map(str, strange))}, which means nothing here")
    found: dict[str, dict[str, object]] = {}
    for key in known:
        part = content.get(key) or {}
        if not isinstance(part, dict):
            raise _damaged(path, f"{key} is no mapping")
        found[key] = {str(name): value for name, value in part.items()}
    return found


def _parse(
    name: str, entry: object, content: Mapping[str, Mapping[str, object]]
) -> dict[Architecture, VendorImage]:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r:.100} is no name for an image; write NAME or NAME:VERSION")
    if not isinstance(entry, dict):
        raise ValueError(f"{name} is no mapping")
    mirror = content["mirrors"].get(str(entry.get("mirror")))
    if mirror is None:
        raise ValueError(f"{name} is at the mirror {entry.get('mirror')!r:.60}, which has no URL")
    base = check_mirror(mirror)
    sums = entry.get("sums")
    if not isinstance(sums, str) or not sums:
        raise ValueError(f"{name} names no sums, without which nothing can be checked")
    images = {}
    for architecture in Architecture:
        path = entry.get(architecture)
        if path is None:
            continue
        if not isinstance(path, str) or not path or path.endswith("/"):
            raise ValueError(f"{name}: {architecture} is no path of a file")
        folder, _, file = f"{base}/{path.lstrip('/')}".rpartition("/")
        beside = sums.replace("{file}", file).replace("{machine}", _MACHINES[architecture])
        images[architecture] = VendorImage(
            name, architecture, f"{folder}/{file}", f"{folder}/{beside}"
        )
    if not images:
        raise ValueError(f"{name} has no file, neither amd64 nor arm64")
    return images


def check_mirror(url: object) -> str:
    """The URL without a slash at its end. Raises ValueError if it is none that can be used."""
    parts = urlsplit(str(url))
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise ValueError(f"{url!r:.100} is no URL of a mirror; write https://HOST/PATH")
    return str(url).rstrip("/")


def _damaged(path: Path, reason: str) -> Damaged:
    return Damaged(f"The catalog {path} cannot be read: {reason}", hint="mend the file")
