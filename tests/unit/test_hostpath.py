"""Which host directories may be shared."""

from __future__ import annotations

from pathlib import Path

import pytest

from lumed.errors import InvalidField
from lumed.hostpath import check_host_path


def reason_of(text: str) -> str:
    with pytest.raises(InvalidField) as caught:
        check_host_path(text)
    assert list(caught.value.fields) == ["hostPath"]
    assert "hostPath" in caught.value.message
    return f"{caught.value.fields['hostPath']} ({caught.value.hint})"


def test_a_directory_is_taken_in_its_shortest_form(tmp_path: Path) -> None:
    (tmp_path / "a b,c").mkdir()
    assert check_host_path(f"{tmp_path}//a b,c/../a b,c/") == tmp_path / "a b,c"
    assert check_host_path(f"/{tmp_path}") == tmp_path


def test_the_tilde_is_the_servers_home_also_if_home_is_behind_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real" / "Projects").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setenv("HOME", str(tmp_path / "link"))
    assert check_host_path("~/Projects") == tmp_path / "real" / "Projects"
    assert check_host_path("~") == tmp_path / "real"


def test_paths_that_lead_nowhere_say_why(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is empty" in reason_of("")
    assert "not absolute" in reason_of("Projects")
    assert "does not exist" in reason_of(f"{tmp_path}/none")
    assert "not a directory" in reason_of(f"{tmp_path}/file")
    assert "unprintable" in reason_of(f"{tmp_path}/a\nb")
    assert "unprintable" in reason_of(f"{tmp_path}\0")
    assert "home that does not exist" in reason_of("~no-such-user/x")
    assert "cannot be used" in reason_of(f"{tmp_path}/{'x' * 300}")


def test_a_link_on_the_way_is_refused_and_named(tmp_path: Path) -> None:
    (tmp_path / "real" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert f"(use {tmp_path}/real)" in reason_of(f"{tmp_path}/link")
    assert f"(use {tmp_path}/real/inner)" in reason_of(f"{tmp_path}/link/inner")
    assert "cannot be used" in reason_of(f"{tmp_path}/loop")


@pytest.mark.parametrize("path", ["/", "/proc", "/proc/self", "/sys/kernel", "/dev/shm", "//proc"])
def test_the_kernels_file_systems_are_refused(path: str) -> None:
    assert reason_of(path)
