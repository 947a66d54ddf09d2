from pathlib import Path

import pytest

from lumed.errors import MissingDependency, ToolFailed
from lumed.images.debs import fetch_packages, find_kernel_packages


def test_a_host_without_apt_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for ask in (lambda: find_kernel_packages("amd64"), lambda: fetch_packages(["x"], tmp_path)):
        with pytest.raises(MissingDependency, match="is not installed") as caught:
            ask()
        assert caught.value.hint


def write_program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_without_package_lists_the_hint_is_to_update_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    write_program(tmp_path / "apt-cache", 'echo "E: No packages found" >&2; exit 100')
    write_program(tmp_path / "apt-get", 'echo "E: Unable to locate package x" >&2; exit 100')
    with pytest.raises(MissingDependency) as unknown:
        find_kernel_packages("amd64")
    assert unknown.value.hint == "sudo apt-get update"
    with pytest.raises(ToolFailed, match="Unable to locate") as failed:
        fetch_packages(["x"], tmp_path)
    assert failed.value.hint == "sudo apt-get update"


def test_ubuntus_kernel_comes_with_its_modules_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    answer = "linux-image-virtual\n  Depends: linux-image-6.8.0-90-generic\n"
    write_program(
        tmp_path / "apt-cache", f'[ "$3" = linux-image-virtual ] || exit 100; echo "{answer}"'
    )
    assert find_kernel_packages("amd64") == [
        "linux-image-6.8.0-90-generic",
        "linux-modules-6.8.0-90-generic",
    ]
