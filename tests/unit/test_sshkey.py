"""The key pair of a home."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lumed.guest.sshkey import read_or_make_key


def test_the_key_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    key = read_or_make_key(tmp_path / "ssh" / "id_ed25519")
    assert key is not None
    assert key.startswith("ssh-ed25519 AAAA")
    assert read_or_make_key(tmp_path / "ssh" / "id_ed25519") == key
    private = tmp_path / "ssh" / "id_ed25519"
    assert private.stat().st_mode & 0o777 == 0o600
    assert private.parent.stat().st_mode & 0o777 == 0o700
    derived = subprocess.check_output(["ssh-keygen", "-y", "-f", private], text=True, timeout=10)
    assert derived.strip() == key
    assert sorted(entry.name for entry in private.parent.iterdir()) == [
        "id_ed25519",
        "id_ed25519.pub",
    ]


def test_many_at_once_get_the_same_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(lambda _: read_or_make_key(tmp_path / "ssh" / "id_ed25519"), range(8)))
    assert len(keys) == 1
    assert (tmp_path / "ssh" / "id_ed25519.pub").read_text().strip() in keys


def test_a_lost_public_half_is_made_again(tmp_path: Path) -> None:
    key = read_or_make_key(tmp_path / "ssh" / "id_ed25519")
    (tmp_path / "ssh" / "id_ed25519.pub").unlink()
    assert read_or_make_key(tmp_path / "ssh" / "id_ed25519") == key


def test_a_lost_private_half_means_a_new_key(tmp_path: Path) -> None:
    key = read_or_make_key(tmp_path / "ssh" / "id_ed25519")
    (tmp_path / "ssh" / "id_ed25519").unlink()
    new = read_or_make_key(tmp_path / "ssh" / "id_ed25519")
    assert new is not None
    assert new != key
    assert read_or_make_key(tmp_path / "ssh" / "id_ed25519") == new


def test_without_ssh_keygen_there_is_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_or_make_key(tmp_path / "home" / "key") is None
