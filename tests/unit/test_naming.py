from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumed.errors import InvalidField
from lumed.naming import check_location_name, check_vm_name, hostname_of, new_mac_address


@pytest.mark.parametrize(
    "name", ["", "../x", "a/b", "x" * 65, ".hidden", "-x", "a b", "a\nb", "ü", None, 3, "a:b:c"]
)
def test_names_that_could_leave_their_folder_are_refused(name: object) -> None:
    with pytest.raises(InvalidField, match="is not a VM name"):
        check_vm_name(name)


def test_one_colon_becomes_an_underscore_as_in_lume() -> None:
    assert check_vm_name("ubuntu:24.04") == "ubuntu_24.04"


@given(st.text(max_size=70))
def test_a_name_that_passes_is_one_plain_path_part(name: str) -> None:
    try:
        checked = check_vm_name(name)
    except InvalidField:
        return
    assert "/" not in checked
    assert checked not in (".", "..")
    assert hostname_of(checked)


def test_location_names_are_plain() -> None:
    assert check_location_name("fast_1") == "fast_1"
    with pytest.raises(InvalidField):
        check_location_name("a/b")


def test_mac_addresses_differ_and_are_unicast() -> None:
    first, second = new_mac_address(), new_mac_address()
    assert first != second
    assert first.startswith("52:54:00:")
