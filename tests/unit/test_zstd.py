"""zstd streams with long runs of zeros, of every kind that packers make."""

from __future__ import annotations

import io
import random
import subprocess
from collections.abc import Callable

import pytest
import zstandard

from lumed.images.decode import BadData
from lumed.images.zstd import ZstdDecoder

MIB = 1 << 20
# A frame with a window of 1 MiB, then blocks: 128 KiB of zeros, and an empty last one.
FRAME = b"\x28\xb5\x2f\xfd\x00\x50"
ZEROS, LAST = b"\x02\x00\x10\x00", b"\x01\x00\x00"


class Source(io.RawIOBase):
    """Gives a stream in pieces of random lengths, as a network does."""

    def __init__(self, packed: bytes, chance: random.Random) -> None:
        self._left = memoryview(packed)
        self._chance = chance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        count = min(len(buffer), len(self._left), self._chance.choice((1, 700, 100_000)))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count


def unpack(packed: bytes, *, takes_zeros: bool, seed: int = 1) -> tuple[bytes, int]:
    """The content, read in pieces of random lengths; how much of it was told as zeros."""
    chance = random.Random(seed)  # noqa: S311 - the same pieces each time
    decoder = ZstdDecoder(Source(packed, chance), 8 * MIB)
    buffer = memoryview(bytearray(MIB))
    content, told = bytearray(), 0
    while count := decoder.readinto(buffer[: chance.choice((1, 5000, 512 << 10, MIB))]):
        content += buffer[:count]
        if takes_zeros:
            zeros = decoder.take_zeros(chance.choice((1, 300_000, 1 << 40)))
            content += bytes(zeros)
            told += zeros
    return bytes(content), told


def make_content(seed: int) -> bytes:
    """Pieces of data, some of them again and again, with zeros of all lengths between them."""
    chance = random.Random(seed)  # noqa: S311
    pieces = [chance.randbytes(n) for n in (1, 300, 4096, 70_000)]
    pieces += [b"text that can be packed, number %d. " % n * 3000 for n in range(3)]
    content = bytearray()
    while len(content) < 24 * MIB:
        content += chance.choice(pieces)
        content += bytes(chance.choice((1, 5000, 128 << 10, MIB, 3 * MIB, 5 * MIB + 77)))
    return bytes(content)


def pack_by_program(content: bytes) -> bytes:
    """In jobs of 8 MiB, each with a first block that repeats zeros; with a sum."""
    return subprocess.run(
        ["zstd", "-q", "-T2", "-c"], input=content, stdout=subprocess.PIPE, check=True
    ).stdout


def pack_with_window(content: bytes, window_log: int, level: int = 3) -> bytes:
    settings = zstandard.ZstdCompressionParameters.from_level(level, window_log=window_log)
    packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    return packer.compress(content) + packer.flush()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "program": pack_by_program,
    "window of 1 KiB": lambda content: pack_with_window(content, 10),
    "window of 1 MiB": lambda content: pack_with_window(content, 20),
    "level 12": lambda content: pack_with_window(content, 21, 12),
    "length and sum": zstandard.ZstdCompressor(write_checksum=True).compress,
    "frames": lambda content: (
        zstandard.compress(content[: 9 * MIB]) + pack_by_program(content[9 * MIB :])
    ),
}


@pytest.mark.parametrize("takes_zeros", [True, False])
@pytest.mark.parametrize("packer", PACKERS)
def test_what_is_unpacked_is_what_was_packed(packer: str, takes_zeros: bool) -> None:
    content = make_content(len(packer))
    unpacked, told = unpack(PACKERS[packer](content), takes_zeros=takes_zeros)
    assert unpacked == content
    assert (told > 0) == takes_zeros


def test_of_a_long_run_of_zeros_only_a_window_and_a_bit_is_unpacked() -> None:
    content = b"begin" + bytes(60 * MIB) + b"end"
    _, told = unpack(pack_by_program(content), takes_zeros=True)
    assert told > 55 * MIB


def test_a_block_that_repeats_data_between_zeros_is_no_zeros() -> None:
    # Whole blocks, so that the second and third time they have no literals.
    data = random.Random(5).randbytes(128 << 10)  # noqa: S311
    content = data + bytes(MIB) + data + bytes(MIB * 7 // 4) + data + bytes(4 * MIB)
    unpacked, told = unpack(pack_with_window(content, 21, 12), takes_zeros=True)
    assert unpacked == content
    assert 0 < told < 2 * MIB


def test_zeros_without_end_are_told_as_they_come() -> None:
    blocks = 500_000
    source = io.BytesIO(FRAME + ZEROS * blocks + LAST)
    decoder = ZstdDecoder(source, 8 * MIB)  # type: ignore[arg-type]
    buffer = memoryview(bytearray(512 << 10))
    total, most = 0, 0
    while count := decoder.readinto(buffer):
        zeros = decoder.take_zeros(1 << 40)
        most = max(most, zeros)
        total += count + zeros
    assert total == blocks * (128 << 10)
    # As many as one read of the stream can hold.
    assert most < total / 5


@pytest.mark.parametrize(
    ("packed", "words"),
    [
        (FRAME + ZEROS * 100, "cut off"),
        (FRAME + ZEROS * 100 + ZEROS[:2], "cut off"),
        (FRAME + ZEROS * 100 + LAST + b"x", "cut off"),
        (FRAME + ZEROS * 100 + LAST + b"not a frame", "something else"),
        (FRAME + ZEROS * 100 + b"\x06\x00\x00" + LAST, "damaged"),  # the fourth kind of block
        (FRAME + ZEROS * 100 + b"\x0a\x00\x10\x00" + LAST, "damaged"),  # more than 128 KiB
        (FRAME[:4] + b"\x08\x50" + LAST, "damaged"),  # a reserved flag
        (FRAME[:4] + b"\x01\x50\x07" + LAST, "damaged"),  # a dictionary
        (FRAME[:4] + b"\xe0" + b"\xff" * 8 + LAST, "memory"),
    ],
)
def test_a_stream_that_is_not_right_is_refused(packed: bytes, words: str) -> None:
    with pytest.raises(BadData, match=words):
        unpack(packed, takes_zeros=True)
