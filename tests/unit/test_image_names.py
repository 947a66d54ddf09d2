"""Names of cached images, and the removal of images."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from lumed.errors import NotFound, WrongState
from lumed.images.local import BuiltImage, ImageCache, hold_image
from lumed.images.names import ImageNames
from lumed.images.record import CachedImage
from lumed.model.image import ImageAbout
from lumed.model.vm import Architecture, Display
from lumed.service.library import Library
from lumed.settings import Settings
from lumed.store.index import VmIndex
from lumed.store.layout import Home
from lumed.store.locations import Locations


async def _make(cache: ImageCache, image_id: str = "x") -> CachedImage:
    async def fill(directory: Path) -> BuiltImage:
        (directory / "disk").write_bytes(bytes(1 << 20))
        about = ImageAbout(architecture=Architecture.ARM64, cpu_count=3, display=Display(800, 600))
        return BuiltImage(directory / "disk", about=about)

    return await cache.get_or_make(image_id, "the image", fill)


def test_a_name_moves_as_a_tag_does(tmp_path: Path) -> None:
    names = ImageNames(tmp_path / "names")
    assert names.find("a/b:1") is None
    assert names.read_all() == {}
    names.write("a/b:1", "one")
    names.write("a/b:2", "one")
    names.write("a/b:1", "two")
    assert names.read_all() == {"a/b:1": "two", "a/b:2": "one"}
    names.remove("a/b:1")
    assert names.find("a/b:1") is None


def test_a_damaged_name_is_no_name(tmp_path: Path) -> None:
    names = ImageNames(tmp_path)
    names.write("a", "one")
    next(tmp_path.iterdir()).write_text("{")
    assert names.find("a") is None
    assert names.read_all() == {}


async def test_what_an_image_says_of_itself_is_kept(tmp_path: Path) -> None:
    made = await _make(ImageCache(tmp_path, {}))
    found = ImageCache(tmp_path, {}).find("x")
    assert found == made
    assert made.about == ImageAbout(
        architecture=Architecture.ARM64, cpu_count=3, display=Display(800, 600)
    )


async def test_a_removed_image_is_gone_with_its_names(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path, {})
    image = await _make(cache)
    cache.names.write("name", image.id)
    assert cache.find_named("name") == image
    cache.remove(image)
    assert cache.find("x") is None
    assert cache.names.read_all() == {}
    assert cache.list_images() == []
    assert list((tmp_path / ".staging").iterdir()) == []


async def test_an_image_that_a_vm_links_or_is_being_made_from_stays(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path / "images", {})
    image = await _make(cache)
    os.link(image.disk, tmp_path / "layer.raw")
    with pytest.raises(WrongState, match="rest on"):
        cache.remove(image)
    (tmp_path / "layer.raw").unlink()
    with hold_image(image), pytest.raises(WrongState, match="just being made"):
        cache.remove(image)
    cache.remove(image)
    with pytest.raises(NotFound, match="removed just now"), hold_image(image):
        pass


async def test_an_image_that_vanishes_while_it_is_listed_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ImageCache(tmp_path / "images", {})
    await _make(cache, "gone")
    await _make(cache, "there")
    found = cache.list_images()
    cache.remove(found[0])
    monkeypatch.setattr(cache, "list_images", lambda: found)
    library = Library(cache, VmIndex(Locations(Home(tmp_path), Settings())))
    assert [view.id for view in await library.list_images()] == ["there"]


async def test_a_removal_that_was_killed_is_swept(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path, {})
    image = await _make(cache)
    (tmp_path / ".staging").mkdir(exist_ok=True)
    image.directory.rename(tmp_path / ".staging" / "doomed")
    assert await cache.sweep() == 1
    assert list((tmp_path / ".staging").iterdir()) == []


async def test_a_download_that_nobody_goes_on_with_is_swept_after_two_weeks(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path / "images", {})
    old, new = cache.blobs / "sha256/aa", cache.blobs / "sha512/bb"
    for file, days in ((old, 15), (new, 13)):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"part")
        at = time.time() - days * 86_400
        os.utime(file, (at, at))
    await cache.sweep()
    assert not old.exists()
    assert new.exists()
