"""A registry's blobs in memory, with every way of sending them badly."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from lumed.errors import RegistryFailed
from lumed.images.oci import ConnectionLost, Descriptor, digest_of


@dataclass
class MemoryStream:
    """One answer: `content` from `offset` on, cut after `cut_at` bytes of the blob."""

    content: bytes
    offset: int
    piece_bytes: int
    cut_at: int | None
    sent: Callable[[int], None]
    _at: int = -1

    def readinto(self, buffer: memoryview, /) -> int:
        at = self.offset if self._at < 0 else self._at
        end = min(at + len(buffer), at + self.piece_bytes, len(self.content))
        if self.cut_at is not None:
            if at >= self.cut_at:
                raise ConnectionLost("The connection was cut")
            end = min(end, self.cut_at)
        buffer[: end - at] = self.content[at:end]
        self._at = end
        self.sent(end - at)
        return end - at


@dataclass
class MemoryBlobs:
    """A BlobSource. requests holds (digest, offset) of each; cuts are used up one by one."""

    piece_bytes: int = 1 << 20
    ignore_range: bool = False
    cuts: dict[str, list[int]] = field(default_factory=dict)
    on_read: Callable[[], object] = lambda: None
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, int]] = field(default_factory=list)
    sent_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, content: bytes, media_type: str = "x/y", **annotations: str) -> Descriptor:
        """Store a blob; annotation keys have "__" for "." and "_" for "-"."""
        digest = digest_of(content)
        self.blobs[digest] = content
        names = {
            key.replace("__", ".").replace("_", "-"): text for key, text in annotations.items()
        }
        return Descriptor(media_type, digest, len(content), names)

    def get_blob(self, blob: Descriptor) -> bytes:
        return self.blobs[blob.digest]

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, offset: int) -> Iterator[MemoryStream]:
        self.requests.append((blob.digest, offset))
        if blob.digest not in self.blobs:
            raise RegistryFailed(f"The registry has no blob {blob.digest}")
        cuts = self.cuts.get(blob.digest)
        yield MemoryStream(
            content=self.blobs[blob.digest],
            offset=0 if self.ignore_range else offset,
            piece_bytes=self.piece_bytes,
            cut_at=cuts.pop(0) if cuts else None,
            sent=self._count,
        )

    def _count(self, count: int) -> None:
        with self._lock:
            self.sent_bytes += count
            self.on_read()
