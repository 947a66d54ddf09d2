"""The catalog of images: what it knows, what users add, and vendors' lists of sums."""

from __future__ import annotations

from pathlib import Path

import pytest

from lumed.errors import Damaged, InvalidField, NotPossibleHere, RegistryFailed
from lumed.images.catalog import VendorImage, find_sum, read_catalog
from lumed.model.vm import Architecture

AMD64, ARM64 = Architecture.AMD64, Architecture.ARM64
A, B, LONG = "a" * 64, "b" * 64, "c" * 128


def image(sums: str = "SHA256SUMS", file: str = "disk-1.0.qcow2") -> VendorImage:
    base = "https://mirror.test/images"
    return VendorImage("disk:1", AMD64, f"{base}/{file}", f"{base}/{sums}")


def test_the_catalog_knows_the_usual_names_for_both_architectures() -> None:
    catalog = read_catalog()
    for name in ("debian:12", "debian:13", "ubuntu:22.04", "ubuntu:24.04", "fedora", "alpine"):
        for architecture in Architecture:
            found = catalog.get(name, architecture)
            assert found.url.startswith("https://")
            assert found.sums_url.startswith(found.url.rpartition("/")[0])
            assert "{" not in found.url + found.sums_url
    assert catalog.get("debian", AMD64) == catalog.get("debian:12", AMD64)
    assert "aarch64-CHECKSUM" in catalog.get("fedora:42", ARM64).sums_url


def test_an_unknown_name_is_answered_with_close_ones() -> None:
    with pytest.raises(InvalidField) as caught:
        read_catalog().get("debain:12", AMD64)
    assert caught.value.hint is not None
    assert "debian:12" in caught.value.hint
    assert "image" in caught.value.fields


def test_a_mirror_of_the_settings_replaces_the_vendors() -> None:
    catalog = read_catalog(mirrors={"debian": "http://127.0.0.1:1234/copy/"})
    found = catalog.get("debian:12", AMD64)
    assert found.url == ("http://127.0.0.1:1234/copy/bookworm/latest/debian-12-generic-amd64.qcow2")
    assert catalog.get("ubuntu:24.04", AMD64).url.startswith("https://cloud-images.ubuntu.com/")


def test_a_users_file_adds_and_replaces(tmp_path: Path) -> None:
    extra = tmp_path / "images.yaml"
    assert read_catalog(extra) == read_catalog()
    extra.write_text("""
mirrors: {ours: https://mirror.test/images}
images:
  ours:1: {mirror: ours, amd64: a/ours.qcow2, sums: "{file}.sha512"}
  debian:12: {mirror: ours, amd64: debian.qcow2, sums: SUMS}
aliases: {debian: ours:1}
""")
    catalog = read_catalog(extra)
    ours = catalog.get("ours:1", AMD64)
    assert ours.url == "https://mirror.test/images/a/ours.qcow2"
    assert ours.sums_url == "https://mirror.test/images/a/ours.qcow2.sha512"
    assert catalog.get("debian", AMD64) == ours
    assert catalog.get("debian:12", AMD64).file == "debian.qcow2"
    assert catalog.knows("ubuntu")
    assert not catalog.knows("ours:2")
    with pytest.raises(NotPossibleHere, match="amd64 only"):
        catalog.get("ours:1", ARM64)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[", "expected the node content"),
        ("- a", "no mapping"),
        ("image: {}", "means nothing"),
        ("images: [a]", "images is no mapping"),
        ("images: {x: 1}", "x is no mapping"),
        ("images: {'../x': {}}", "no name"),
        ("images: {x: {mirror: nowhere}}", "no URL"),
        ("images: {x: {mirror: debian, amd64: a}}", "no sums"),
        ("images: {x: {mirror: debian, sums: S}}", "no file"),
        ("images: {x: {mirror: debian, sums: S, amd64: 5}}", "no path"),
        ("mirrors: {debian: 'file:///etc'}", "no URL of a mirror"),
        ("aliases: {x: y}", "no image"),
    ],
)
def test_a_users_file_that_is_wrong_is_told_with_the_entry(
    tmp_path: Path, text: str, reason: str
) -> None:
    extra = tmp_path / "images.yaml"
    extra.write_text(text)
    with pytest.raises(Damaged, match=reason) as caught:
        read_catalog(extra)
    assert str(extra) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{A} *disk-1.0.qcow2\n{B} *other\n", A),  # Ubuntu
        (f"{B}  disk-1.0.qcow2.old\n{LONG}  disk-1.0.qcow2\n", LONG),  # Debian
        (f"{A.upper()}  ./disk-1.0.qcow2\n", A),
        (
            "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\n# disk-1.0.qcow2: 5 bytes\n"
            f"SHA256 (disk-1.0.qcow2) = {A}\nSHA256 (x) = {B}\n-----BEGIN PGP SIGNATURE-----\n",
            A,
        ),  # Fedora
    ],
)
def test_the_sum_is_found_in_each_vendors_form(text: str, expected: str) -> None:
    found = find_sum(text, image())
    assert found.hex == expected
    assert found.algorithm == ("sha512" if expected == LONG else "sha256")


def test_a_sum_alone_counts_only_in_a_file_named_after_the_image() -> None:
    assert find_sum(f"{LONG}\n", image("disk-1.0.qcow2.sha512")).hex == LONG
    with pytest.raises(RegistryFailed, match="does not name"):
        find_sum(f"{LONG}\n", image("SHA512SUMS"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<html>disk-1.0.qcow2</html>",
        f"{A}  disk-1.0.qcow2.xz",
        f"{A[:40]}  disk-1.0.qcow2",
        f"{A}{A[:9]}  disk-1.0.qcow2",
        f"{A} disk-1.0.qcow2\n{B} disk-1.0.qcow2\n",
    ],
)
def test_without_one_sum_for_the_file_nothing_is_taken(text: str) -> None:
    with pytest.raises(RegistryFailed, match="cannot be checked"):
        find_sum(text, image())
