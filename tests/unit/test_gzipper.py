"""Pieces that are compressed apart are one gzip file."""

from __future__ import annotations

import gzip
import hashlib
import io
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumed.images.gzipper import Gzipper, Member, Piece


@pytest.fixture(scope="module")
def gzipper() -> Iterator[Gzipper]:
    with Gzipper() as made:
        yield made


def piece(content: bytes) -> Piece:
    return Piece(len(content), lambda: content)


def write(gzipper: Gzipper, *pieces: Piece) -> tuple[bytes, Member]:
    file = io.BytesIO()
    member = gzipper.write(pieces, file, lambda _: None)
    return file.getvalue(), member


@given(st.lists(st.one_of(st.binary(max_size=300), st.integers(0, 70_000)), max_size=12))
def test_any_pieces_come_back_as_they_were(gzipper: Gzipper, parts: list[bytes | int]) -> None:
    pieces = [Piece(part, None) if isinstance(part, int) else piece(part) for part in parts]
    content = b"".join(bytes(part) for part in parts)
    packed, member = write(gzipper, *pieces)
    assert gzip.decompress(packed) == content
    assert member == Member(
        f"sha256:{hashlib.sha256(packed).hexdigest()}",
        len(packed),
        f"sha256:{hashlib.sha256(content).hexdigest()}",
        len(content),
    )


def test_zeros_that_are_read_give_the_same_bytes_as_a_hole(gzipper: Gzipper) -> None:
    assert write(gzipper, piece(bytes(5000))) == write(gzipper, Piece(5000, None))


def test_the_bytes_do_not_depend_on_which_thread_was_quicker(gzipper: Gzipper) -> None:
    parts = [piece(bytes([number]) * (1 + number % 3 * 400_000)) for number in range(40)]
    assert len({write(gzipper, *parts)[0] for _ in range(5)}) == 1


def test_a_mib_of_zeros_takes_less_than_two_kib(gzipper: Gzipper) -> None:
    assert write(gzipper, Piece(1 << 20, None))[1].size_bytes < 2048


def test_only_a_few_pieces_are_held_at_once(gzipper: Gzipper) -> None:
    held = most = 0

    def read() -> bytes:
        nonlocal held, most
        held += 1
        most = max(most, held)
        return b"x"

    def report(_: Piece) -> None:
        nonlocal held
        held -= 1

    gzipper.write([Piece(1, read) for _ in range(500)], io.BytesIO(), report)
    assert most <= gzipper.workers + 2


def fail() -> bytes:
    raise OSError("no disk")


def refuse(_: Piece) -> None:
    raise OSError("enough")


@pytest.mark.parametrize(
    ("read", "report", "words"),
    [(fail, lambda _: None, "no disk"), (lambda: b"x", refuse, "enough")],
)
def test_what_read_and_report_raise_ends_the_member(
    gzipper: Gzipper, read: Callable[[], bytes], report: Callable[[Piece], None], words: str
) -> None:
    with pytest.raises(OSError, match=words):
        gzipper.write([Piece(1, read)] * 50, io.BytesIO(), report)
