"""Disk images as users bring them, made by the real qemu-img."""

import contextlib
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lumed
from lumed.errors import InvalidField
from lumed.images.inspect import DiskFacts, inspect_disk, inspect_disk_blocking
from lumed.model.vm import DiskFormat, Firmware

MIB = 1 << 20
BOOT_SECTOR = (
    b"\xfa\xeb\x63\x90".ljust(446, b"\0") + b"\x80\0\0\0\x83".ljust(64, b"\0") + b"\x55\xaa"
)


def qemu_img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *arguments], check=True, timeout=30, stdout=subprocess.DEVNULL)


def make_qcow2(path: Path, *options: str, size: str = "64M") -> Path:
    qemu_img("create", "-q", "-f", "qcow2", *options, path, size)
    return path


def make_raw(path: Path, content: bytes = b"", size: int = 4 * MIB) -> Path:
    path.write_bytes(content)
    os.truncate(path, size)
    return path


def check_status(path: Path) -> int:
    argv = ["qemu-img", "check", "-q", "-f", "qcow2", str(path)]
    return subprocess.run(argv, check=False, capture_output=True, timeout=30).returncode


async def refusal(path: Path) -> str:
    """The reason for which a file is refused, which the message must repeat with the name."""
    with pytest.raises(InvalidField) as caught:
        await inspect_disk(path)
    reason = caught.value.fields["image"]
    assert isinstance(reason, str)
    assert caught.value.message == f"The image {path} cannot be used: {reason}"
    return reason


@pytest.mark.parametrize("name", ["a.qcow2", "a.img", "a"])
async def test_a_clean_qcow2_is_taken_under_any_name_but_raw(tmp_path: Path, name: str) -> None:
    path = make_qcow2(tmp_path / name)
    assert await inspect_disk(path) == DiskFacts(
        DiskFormat.QCOW2, 64 * MIB, path.stat().st_blocks * 512, Firmware.UEFI
    )


@pytest.mark.parametrize(
    "options",
    [
        ["-o", "compat=0.10"],
        ["-o", "cluster_size=512"],
        ["-o", "cluster_size=2M"],
        ["-o", "extended_l2=on"],
        ["-o", "compression_type=zstd"],
        ["-o", "lazy_refcounts=on"],
        ["-o", "preallocation=metadata"],
    ],
)
async def test_every_kind_of_clean_qcow2_is_taken(tmp_path: Path, options: list[str]) -> None:
    facts = await inspect_disk(make_qcow2(tmp_path / "a.qcow2", *options))
    assert (facts.format, facts.virtual_size_bytes) == (DiskFormat.QCOW2, 64 * MIB)


async def test_a_qcow2_with_an_internal_snapshot_is_taken(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "a.qcow2")
    qemu_img("snapshot", "-c", "before", path)
    assert (await inspect_disk(path)).format is DiskFormat.QCOW2


async def test_a_raw_disk_is_taken_and_its_last_sector_rounded_up(tmp_path: Path) -> None:
    path = make_raw(tmp_path / "a.img", size=4 * MIB + 1)
    facts = await inspect_disk(path)
    assert (facts.format, facts.virtual_size_bytes) == (DiskFormat.RAW, 4 * MIB + 512)
    assert facts.allocated_bytes == path.stat().st_blocks * 512 < MIB


@pytest.mark.parametrize("compress", [[], ["-c"], ["-c", "-o", "compression_type=zstd"]])
async def test_the_firmware_is_read_from_what_the_guest_sees(
    tmp_path: Path, compress: list[str]
) -> None:
    raw = make_raw(tmp_path / "a.raw", BOOT_SECTOR)
    assert (await inspect_disk(raw)).firmware is Firmware.BIOS
    qemu_img("convert", "-f", "raw", "-O", "qcow2", *compress, raw, tmp_path / "a.qcow2")
    assert (await inspect_disk(tmp_path / "a.qcow2")).firmware is Firmware.BIOS


async def test_a_disk_of_one_sector_is_enough(tmp_path: Path) -> None:
    assert (
        await inspect_disk(make_raw(tmp_path / "a", BOOT_SECTOR, 512))
    ).virtual_size_bytes == 512
    small = make_qcow2(tmp_path / "b", size="512")
    assert (await inspect_disk(small)).virtual_size_bytes == 512


async def test_a_backing_file_is_refused_whatever_the_name(tmp_path: Path) -> None:
    base = make_raw(tmp_path / "secret")
    for name in ("a.qcow2", "a.img"):
        path = make_qcow2(tmp_path / name, "-b", str(base), "-F", "raw")
        assert "backing file" in await refusal(path)


async def test_an_external_data_file_is_refused(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "a.qcow2", "-o", f"data_file={tmp_path / 'data'}")
    assert "external data file" in await refusal(path)


async def test_a_raw_disk_with_a_qcow2_header_is_refused(tmp_path: Path) -> None:
    for name in ("a.raw", "a.RAW", "a.dd"):
        assert "begins with a qcow2 header" in await refusal(make_qcow2(tmp_path / name))


async def test_an_encrypted_qcow2_is_refused(tmp_path: Path) -> None:
    # AES: for LUKS, qemu-img measures the CPU for seconds; the header's field is the same.
    secret = ("--object", "secret,id=s,data=x", "-o", "encrypt.format=aes,encrypt.key-secret=s")
    assert "encrypted" in await refusal(make_qcow2(tmp_path / "a.qcow2", *secret))


async def test_a_download_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    raw = tmp_path / "a.raw"
    raw.write_bytes(os.urandom(2 * MIB))
    path = tmp_path / "a.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, path)
    os.truncate(path, path.stat().st_size // 2)
    reason = await refusal(path)
    assert "does not pass the check" in reason
    os.truncate(path, 0x20000)
    assert "behind the end of the file" in await refusal(path)


async def test_leaked_clusters_are_no_reason_to_refuse(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "a.qcow2")
    with path.open("r+b") as file:
        file.seek(0x20000 + 2 * 10)  # the count of a cluster that nothing uses
        file.write(struct.pack(">H", 1))
    os.truncate(path, 11 << 16)
    assert check_status(path) == 3
    assert (await inspect_disk(path)).format is DiskFormat.QCOW2


@pytest.mark.parametrize(
    ("tool_name", "options"),
    [
        ("vmdk", []),
        ("vmdk", ["-o", "subformat=streamOptimized"]),
        ("vmdk", ["-o", "subformat=monolithicFlat"]),
        ("vdi", []),
        ("vhdx", []),
        ("vpc", []),
        ("vpc", ["-o", "subformat=fixed"]),
        ("qed", []),
        ("parallels", []),
        ("qcow", []),
    ],
)
async def test_other_formats_are_named_with_the_line_that_converts_them(
    tmp_path: Path, tool_name: str, options: list[str]
) -> None:
    path = tmp_path / "a.img"
    qemu_img("create", "-q", "-f", tool_name, *options, path, "4M")
    with pytest.raises(InvalidField) as caught:
        await inspect_disk(path)
    assert f"qemu-img convert -f {tool_name} -O qcow2" in (caught.value.hint or "")


async def test_a_luks_disk_is_refused(tmp_path: Path) -> None:
    assert "LUKS" in await refusal(make_raw(tmp_path / "a.img", b"LUKS\xba\xbe\0\1aes"))


async def test_an_iso_is_told_to_be_mounted(tmp_path: Path) -> None:
    path = make_raw(tmp_path / "installer.iso", bytes(0x8000) + b"\x01CD001\x01")
    with pytest.raises(InvalidField, match="it is an ISO") as caught:
        await inspect_disk(path)
    assert "mount" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("magic", "word"),
    [(b"\x1f\x8b\x08", "gzip"), (b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstd")],
)
async def test_a_compressed_file_is_told_to_be_unpacked(
    tmp_path: Path, magic: bytes, word: str
) -> None:
    assert word in await refusal(make_raw(tmp_path / "a.img", magic))


async def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes(b"x" * 511)
    assert "does not exist" in await refusal(tmp_path / "missing")
    assert "directory" in await refusal(tmp_path)
    assert "no regular file" in await refusal(tmp_path / "fifo")
    assert "no regular file" in await refusal(Path("/dev/null"))
    assert "cannot be read" in await refusal(tmp_path / "loop")
    assert "cannot be read" in await refusal(tmp_path / "nul\0nul")
    assert "empty" in await refusal(tmp_path / "empty")
    assert "too small" in await refusal(tmp_path / "short")


async def test_a_device_is_not_even_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    real = os.open

    def recording(path: str, flags: int, mode: int = 0o777, **more: int) -> int:
        opened.append(path)
        return real(path, flags, mode, **more)

    monkeypatch.setattr(os, "open", recording)
    assert "no regular file" in await refusal(Path("/dev/null"))
    assert Path("/dev/null") not in opened


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    path = make_raw(tmp_path / "a.img")
    path.chmod(0o600)
    code = (
        "import sys; from pathlib import Path\n"
        "from lumed.images.inspect import inspect_disk_blocking\n"
        "inspect_disk_blocking(Path(sys.argv[1]))"
    )
    system_python = shutil.which("python3", path="/usr/bin") or sys.executable
    become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    done = subprocess.run(
        [*become, system_python, "-c", code, path],
        env={"PYTHONPATH": str(Path(lumed.__file__).parents[1]), "PATH": "/usr/bin:/bin"},
        check=False,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert "InvalidField" in done.stderr
    assert "cannot be read: Permission denied" in done.stderr


async def test_names_that_qemu_could_take_for_options_are_plain_names(tmp_path: Path) -> None:
    for name in ("json:{}", "nbd:host", "a,b=c", "-f", "ü ö\n"):
        facts = await inspect_disk(make_qcow2(tmp_path / name))
        assert facts.virtual_size_bytes == 64 * MIB


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(st.integers(0, 4 << 16), st.binary(min_size=1, max_size=8))
        | st.tuples(st.integers(0, 111), st.binary(min_size=1, max_size=2)),
        min_size=1,
        max_size=3,
    )
)
def test_a_mutated_image_is_refused_or_taken_but_never_breaks(
    tmp_path: Path, patches: list[tuple[int, bytes]]
) -> None:
    path = tmp_path / "mutated.img"
    if not path.exists():
        make_qcow2(path)
    clean = path.read_bytes()
    with path.open("r+b") as file:
        for at, patch in patches:
            file.seek(at)
            file.write(patch)
    try:
        with contextlib.suppress(InvalidField):
            inspect_disk_blocking(path)
    finally:
        path.write_bytes(clean)
