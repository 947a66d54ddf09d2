"""Names of images."""

from __future__ import annotations

import pytest

from lumed.errors import InvalidField
from lumed.images.reference import parse_full_reference, parse_reference

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("image", "organization", "expected"),
    [
        ("ubuntu", "trycua", "ghcr.io/trycua/ubuntu:latest"),
        ("ubuntu:24.04", "trycua", "ghcr.io/trycua/ubuntu:24.04"),
        (f"ubuntu@{DIGEST}", "", f"ghcr.io/ubuntu@{DIGEST}"),
        (f"ubuntu:24.04@{DIGEST}", "", f"ghcr.io/ubuntu@{DIGEST}"),
        ("a/b_c:x", "one/two", "ghcr.io/one/two/a/b_c:x"),
        ("macos-sequoia-vanilla:latest", "/trycua/", "ghcr.io/trycua/macos-sequoia-vanilla:latest"),
    ],
)
def test_a_name_and_its_organization_make_a_reference(
    image: str, organization: str, expected: str
) -> None:
    assert str(parse_reference(image, "ghcr.io", organization)) == expected


@pytest.mark.parametrize(
    ("image", "registry", "organization", "field"),
    [
        ("", "ghcr.io", "", "image"),
        ("Ubuntu", "ghcr.io", "", "image"),
        ("../x", "ghcr.io", "", "image"),
        ("ubuntu:", "ghcr.io", "", "image"),
        ("ubuntu:a b", "ghcr.io", "", "image"),
        ("ubuntu@sha256:12", "ghcr.io", "", "image"),
        ("a" * 300, "ghcr.io", "", "image"),
        ("ubuntu", "", "", "registry"),
        ("ubuntu", "http://ghcr.io", "", "registry"),
        ("ubuntu", "ghcr.io/x", "", "registry"),
        ("ubuntu", "user@ghcr.io", "", "registry"),
        ("ubuntu", "ghcr.io", "../..", "organization"),
        ("ubuntu", "ghcr.io", "Up", "organization"),
    ],
)
def test_what_is_no_name_is_refused_by_its_field(
    image: str, registry: str, organization: str, field: str
) -> None:
    with pytest.raises(InvalidField) as caught:
        parse_reference(image, registry, organization)
    assert list(caught.value.fields) == [field]


def test_a_full_reference_begins_with_a_host() -> None:
    found = parse_full_reference("127.0.0.1:5000/a/b:c")
    assert found is not None
    assert (found.registry, found.repository, found.tag) == ("127.0.0.1:5000", "a/b", "c")
    assert str(parse_full_reference("localhost/a")) == "localhost/a:latest"
    assert str(parse_full_reference("[::1]:5000/a")) == "[::1]:5000/a:latest"
    for text in ("debian:12", "tiny", "/path/to/disk.img", "./disk.img", "../x", "a/b"):
        assert parse_full_reference(text) is None
