from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumed.errors import InvalidField
from lumed.units import GIB, KIB, MIB, TIB, describe_size, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * GIB),
        ("4gb", 4 * GIB),
        ("8.0GB", 8 * GIB),
        ("1.5g", 3 * GIB // 2),
        ("512MiB", 512 * MIB),
        ("64K", 64 * KIB),
        ("1TB", TIB),
        ("4", 4 * GIB),
        (" 4 GB ", 4 * GIB),
        ("100B", 100),
        (4096, 4096),
        (4096.0, 4096),
    ],
)
def test_every_spelling_of_a_size_is_understood(text: object, size: int) -> None:
    assert parse_size(text, "memory") == size


@pytest.mark.parametrize(
    "text",
    ["-1GB", "0", "4XB", "1e99GB", "", "GB", "1.GB", "four", None, True, [], -1, 0, 1.5, "9" * 40],
)
def test_anything_else_is_refused_by_field(text: object) -> None:
    with pytest.raises(InvalidField) as refused:
        parse_size(text, "memory")
    assert "memory" in refused.value.fields


@given(st.integers(1, 2**60))
def test_a_formatted_size_reads_back_exactly(size: int) -> None:
    assert parse_size(format_size(size), "x") == size


def test_sizes_are_written_as_the_document_writes_them() -> None:
    assert [format_size(n) for n in (4 * GIB, 1536 * MIB, TIB, 1000)] == [
        "4GB",
        "1536MB",
        "1024GB",
        "1000B",
    ]
    assert describe_size(3_300_000_000) == "3.1 GB"
