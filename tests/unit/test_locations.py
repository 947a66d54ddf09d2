"""Names for folders that hold VMs."""

from __future__ import annotations

from pathlib import Path

import pytest

from lumed.errors import InvalidField, NotFound
from lumed.settings import Settings
from lumed.store.layout import Home
from lumed.store.locations import Locations


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.prepare()
    return home


def test_built_in_names_are_folders_of_the_home_until_configured(home: Home) -> None:
    locations = Locations(home, Settings(locations={"ssd": "/mnt/ssd", "fast": "/mnt/fast"}))
    assert locations.get("home") == ("home", home.root / "vms")
    assert locations.get("hdd") == ("hdd", home.root / "storage/hdd")
    assert locations.get("ssd") == ("ssd", Path("/mnt/ssd"))
    assert locations.get("fast") == ("fast", Path("/mnt/fast"))
    assert set(locations.named()) == {"home", "ssd", "hdd", "nvme", "ephemeral", "fast"}


def test_no_storage_is_the_default_one(home: Home) -> None:
    assert Locations(home, Settings()).get(None)[0] == "home"
    locations = Locations(home, Settings(default_location="hdd"))
    assert (locations.default, locations.get(None)[0]) == ("hdd", "hdd")


def test_a_path_is_a_location_and_one_that_has_a_name_is_that_one(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    locations = Locations(home, Settings(locations={"fast": "/mnt/fast"}))
    assert locations.get("/srv/vms") == ("/srv/vms", Path("/srv/vms"))
    assert locations.get("/srv//x/../vms/") == ("/srv/vms", Path("/srv/vms"))
    assert locations.get("/mnt/fast/") == ("fast", Path("/mnt/fast"))
    monkeypatch.setenv("HOME", "/home/me")
    assert locations.get("~/vms") == ("/home/me/vms", Path("/home/me/vms"))


@pytest.mark.parametrize(
    "storage", ["floppy", "", "a/b", "./a", "../a", "~nobody-here/x", "/a\0b", "SSD"]
)
def test_what_is_no_location_is_refused_with_the_known_ones(home: Home, storage: str) -> None:
    with pytest.raises(InvalidField) as caught:
        Locations(home, Settings()).get(storage)
    assert list(caught.value.fields) == ["storage"]
    assert "POST /lume/config/locations" in str(caught.value.hint)
    if "/" not in storage:
        assert "ephemeral, hdd, home, nvme, ssd" in caught.value.message


def test_an_unknown_name_is_not_found(home: Home) -> None:
    with pytest.raises(NotFound, match="VM location not found: floppy"):
        Locations(home, Settings()).find_named("floppy")


def test_a_path_is_remembered_once_and_by_the_next_server(home: Home) -> None:
    locations = Locations(home, Settings())
    for path in ("/srv/vms", "/srv/vms", "/srv/more", str(home.location("ssd"))):
        locations.remember(Path(path))
    again = Locations(home, Settings(locations={"fast": "/srv/more"})).every()
    assert again[-1] == ("/srv/vms", Path("/srv/vms"))
    assert [place for _, place in again].count(Path("/srv/more")) == 1
    assert ("fast", Path("/srv/more")) in again


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"paths": 3}', '{"paths": [3]}', '{"paths": ["relative"]}']
)
def test_a_torn_list_of_paths_is_an_empty_one(home: Home, content: str) -> None:
    home.seen_paths.write_text(content)
    assert len(Locations(home, Settings()).every()) == 5
