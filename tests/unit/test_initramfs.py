import lzma
import stat
from pathlib import Path

import pytest

from lumed.errors import ToolFailed
from lumed.images.initramfs import Archive, read_modules


def read_newc(data: bytes) -> dict[str, tuple[int, bytes]]:
    """Mode and content by path, read as cpio(5) describes the format."""
    entries: dict[str, tuple[int, bytes]] = {}
    position = 0
    while True:
        assert data[position : position + 6] == b"070701"
        fields = [int(data[position + 6 + 8 * n : position + 14 + 8 * n], 16) for n in range(13)]
        name_start = position + 110
        name_end = name_start + fields[11]
        start = (name_end + 3) // 4 * 4
        end = start + fields[6]
        name = data[name_start : name_end - 1].decode()
        position = (end + 3) // 4 * 4
        if name == "TRAILER!!!":
            assert position == len(data)
            return entries
        entries[name] = (fields[1], data[start:end])


def test_parents_come_before_what_they_hold_and_contents_come_back_whole() -> None:
    archive = Archive()
    archive.add_character_device("dev/console", 5, 1)
    archive.add_file("usr/bin/odd name", b"12345", 0o755)
    archive.add_link("bin", "usr/bin")
    archive.add_file("usr/note", b"")
    entries = read_newc(archive.data())
    assert list(entries) == ["dev", "dev/console", "usr", "usr/bin", "usr/bin/odd name", "bin",
                             "usr/note"]  # fmt: skip
    assert entries["usr/bin/odd name"] == (stat.S_IFREG | 0o755, b"12345")
    assert entries["bin"] == (stat.S_IFLNK | 0o777, b"usr/bin")
    assert stat.S_ISCHR(entries["dev/console"][0])
    assert stat.S_ISDIR(entries["usr"][0])


def write_module(path: Path, depends: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = b"ELF\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0"
    path.write_bytes(lzma.compress(content) if path.suffix == ".xz" else content)


def test_modules_come_in_the_order_of_loading_and_absent_ones_are_left_out(tmp_path: Path) -> None:
    write_module(tmp_path / "a/virtio-rng.ko", "virtio,virtio_ring")
    write_module(tmp_path / "b/virtio.ko", "virtio_ring")
    write_module(tmp_path / "b/virtio_ring.ko.xz", "")
    found = read_modules(tmp_path, ["virtio_rng", "built_in", "virtio-ring"])
    names = {wanted: [module.name for module in order] for wanted, order in found.items()}
    assert names == {
        "virtio_rng": ["virtio_ring", "virtio", "virtio_rng"],
        "virtio-ring": ["virtio_ring"],
    }
    assert found["virtio-ring"][0].content.startswith(b"ELF")


def test_a_file_that_is_no_module_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.ko").write_bytes(b"nothing")
    with pytest.raises(ToolFailed, match="broken"):
        read_modules(tmp_path, ["broken"])
