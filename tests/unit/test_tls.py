"""The certificate and the key of a server, as files that may be anything."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lumed.errors import InvalidField
from lumed.http.tls import read_tls
from tests.registry.world import make_certificate


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


def test_a_certificate_and_its_key_are_taken_also_from_one_file(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    read_tls(*pair)
    both = tmp_path / "both.pem"
    both.write_bytes(pair[1].read_bytes() + pair[0].read_bytes())
    read_tls(both, both)


def test_a_key_of_another_certificate_is_told(pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, other = make_certificate(tmp_path)
    with pytest.raises(InvalidField, match=f"it is not the key of {pair[0]}"):
        read_tls(pair[0], other)


def test_an_encrypted_key_is_told_and_nobody_is_asked(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    encrypted = tmp_path / "encrypted.pem"
    lock = ["-aes256", "-passout", "pass:x"]
    subprocess.run(
        ["openssl", "pkey", "-in", str(pair[1]), "-out", str(encrypted), *lock], check=True
    )
    with pytest.raises(InvalidField, match=r"cannot be used: it is encrypted") as told:
        read_tls(pair[0], encrypted)
    assert f"openssl pkey -in {encrypted}" in str(told.value.hint)


@pytest.mark.parametrize("content", [b"", b"\xff\0\xfe", b"-----BEGIN CERTIFICATE-----\nx\n"])
def test_what_is_no_pem_is_told_by_its_option(
    pair: tuple[Path, Path], tmp_path: Path, content: bytes
) -> None:
    odd = tmp_path / "odd.pem"
    odd.write_bytes(content)
    with pytest.raises(InvalidField, match=rf"--tls-cert {odd} cannot .*: it holds no certificate"):
        read_tls(odd, pair[1])
    with pytest.raises(InvalidField, match=rf"--tls-key {odd} cannot .*: it holds no usable key"):
        read_tls(pair[0], odd)


def test_the_two_in_the_wrong_order_are_told(pair: tuple[Path, Path]) -> None:
    with pytest.raises(InvalidField, match=r"--tls-cert .* it holds no certificate"):
        read_tls(pair[1], pair[0])


@pytest.mark.parametrize("place", ["missing", "folder"])
def test_a_file_that_cannot_be_read_is_told(
    pair: tuple[Path, Path], tmp_path: Path, place: str
) -> None:
    (tmp_path / "folder").mkdir()
    odd = tmp_path / place
    with pytest.raises(InvalidField, match=f"--tls-cert {odd} cannot be used: "):
        read_tls(odd, pair[1])
    with pytest.raises(InvalidField, match=f"--tls-key {odd} cannot be used: "):
        read_tls(pair[0], odd)
