"""The settings file: read with care, written without losing what is not ours."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from lumed.errors import Damaged
from lumed.settings import Settings, read_settings, settings_path, with_location, write_settings

# As Lume writes it, with keys that lumed does not use.
LUME = """\
vmLocations:
- name: home
  path: ~/.lume
- name: fast-1
  path: /mnt/fast
defaultLocationName: fast-1
cacheDirectory: ~/.lume/cache
cachingEnabled: false
telemetryEnabled: true
registry:
  type: gcs
  ghcr:
    registry: registry.example
    organization: us
  gcs:
    apiUrl: https://images.example
    apiKey: secret
"""


def test_without_a_file_there_are_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    assert read_settings(path) == Settings(path=path)
    for empty in ("", "# nothing\n", "---\n"):
        path.write_text(empty)
        assert read_settings(path) == Settings(path=path)


def test_lumes_own_file_is_understood(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(LUME)
    settings = read_settings(path)
    assert settings.locations == {"home": str(Path.home() / ".lume"), "fast-1": "/mnt/fast"}
    assert settings.default_location == "fast-1"
    assert settings.cache_directory == str(Path.home() / ".lume/cache")
    assert settings.caching_enabled is False
    assert (settings.registry, settings.organization) == ("registry.example", "us")


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    settings = Settings(
        default_location="fast",
        locations={"fast": "/mnt/fast", "home": "/srv/vms"},
        cache_directory="/var/cache/vms",
        caching_enabled=False,
        default_image="debian",
        registry="registry.example",
        organization="us",
        accelerator="tcg",
        path=tmp_path / "new/config.yaml",
    )
    write_settings(settings)
    path = tmp_path / "new/config.yaml"
    assert read_settings(path) == settings
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_change_keeps_every_key_that_lumed_does_not_use(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(LUME)
    write_settings(with_location(read_settings(path), "more", "/mnt/more"))
    written = yaml.safe_load(path.read_text())
    before = yaml.safe_load(LUME)
    assert written["telemetryEnabled"] is True
    assert written["registry"] == before["registry"]
    assert {entry["name"] for entry in written["vmLocations"]} == {"home", "fast-1", "more"}
    assert read_settings(path).locations["more"] == "/mnt/more"


def test_a_file_that_was_broken_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    settings = read_settings(path)
    path.write_text("vmLocations: [")
    with pytest.raises(Damaged):
        write_settings(replace(settings, default_location="ssd"))
    assert path.read_text() == "vmLocations: ["


def test_a_link_to_the_file_stays_a_link(tmp_path: Path) -> None:
    real = tmp_path / "dotfiles/lume.yaml"
    real.parent.mkdir()
    real.write_text(LUME)
    link = tmp_path / "config.yaml"
    link.symlink_to(real)
    write_settings(replace(read_settings(link), default_location="ssd"))
    assert link.is_symlink()
    assert read_settings(real).default_location == "ssd"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [", "expected"),
        ("- a\n- b\n", "no mapping"),
        ("just words", "no mapping"),
        ("vmLocations: words", ""),
        ("vmLocations: 3", ""),
        ("vmLocations: [{name: fast}]", "path"),
        ("vmLocations: [{name: ../x, path: /a}]", "not a location name"),
        ("vmLocations: [{name: fast, path: relative/x}]", "the path of fast"),
        ("vmLocations: [{name: fast, path: ~nobody-here/x}]", "home that does not exist"),
        ("defaultLocationName: fast", "vmLocations does not name"),
        ("cacheDirectory: relative", "cacheDirectory"),
        ("registry: words", ""),
        ("since: 2026-99-99", "month must be in 1..12"),
        ("[" * 5000, ""),
        ("\0", ""),
    ],
)
def test_a_file_that_cannot_be_understood_is_damaged_with_the_reason(
    tmp_path: Path, text: str, reason: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(Damaged, match=r"The settings file .*config\.yaml cannot be read") as caught:
        read_settings(path)
    assert reason in caught.value.message
    assert caught.value.hint is not None
    assert path.read_text() == text


def test_a_folder_in_the_place_of_the_file_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(Damaged, match="directory"):
        read_settings(tmp_path)


_KEYS = st.sampled_from(
    ["vmLocations", "defaultLocationName", "cacheDirectory", "registry", "ghcr", "name", "path"]
)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(_KEYS, _VALUES))
def test_any_yaml_gives_settings_or_damage(value: dict[str, object]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(value))
        try:
            settings = read_settings(path)
        except Damaged:
            return
        write_settings(settings)
        assert read_settings(path) == settings


@given(st.binary(max_size=60))
@example(b"a: !!python/object:os.system {}")
@example(b"\xff\xfe")
def test_any_bytes_give_settings_or_damage(content: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_bytes(content)
        with contextlib.suppress(Damaged):
            assert read_settings(path).path == path


def test_a_named_home_has_its_own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings_path(tmp_path, named=True) == tmp_path / "config.yaml"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert settings_path(tmp_path, named=False) == tmp_path / "xdg/lume/config.yaml"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings_path(tmp_path, named=False) == tmp_path / ".config/lume/config.yaml"


def test_mirrors_are_read_and_survive_a_write(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("mirrors:\n  debian: http://127.0.0.1:1234/cloud\n")
    settings = read_settings(path)
    assert settings.mirrors == {"debian": "http://127.0.0.1:1234/cloud"}
    write_settings(replace(settings, default_image="debian:12"))
    assert read_settings(path).mirrors == settings.mirrors


@pytest.mark.parametrize("mirrors", ["debian", "{debian: ftp://mirror}", "{debian: 5}"])
def test_a_mirror_that_is_no_url_is_told(tmp_path: Path, mirrors: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"mirrors: {mirrors}\n")
    with pytest.raises(Damaged, match="mirror"):
        read_settings(path)
