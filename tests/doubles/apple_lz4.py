"""Apple's framing of LZ4, written as its Compression framework does: blocks with a history."""

from __future__ import annotations

import struct

import lz4.block

HISTORY_BYTES = 64 << 10


def pack(content: bytes, block_bytes: int = 64 << 10, *, linked: bool = True) -> bytes:
    """Frame content; linked: matches reach into the blocks before."""
    out = bytearray()
    for at in range(0, len(content), block_bytes):
        block = content[at : at + block_bytes]
        history = content[max(0, at - HISTORY_BYTES) : at] if linked else b""
        packed = lz4.block.compress(block, store_size=False, dict=history)
        if len(packed) < len(block):
            out += b"bv41" + struct.pack("<II", len(block), len(packed)) + packed
        else:
            out += b"bv4-" + struct.pack("<I", len(block)) + block
    return bytes(out + b"bv4$")
