import asyncio
import contextlib
import io
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pycdlib import PyCdlib

from lumed.images.local import ImageCache
from lumed.images.tiny import (
    KERNEL_ARGUMENTS,
    RESCUE_ARGUMENTS,
    TinyImage,
    build_tiny,
    builtin_tiny,
)
from lumed.machine.qemu.firmware import find_uefi
from lumed.model.vm import DiskFormat
from tests.qemu.rawqemu import RawQemu, find_free_port, start_qemu, wait_answer

# Other work shares the two cores: a boot takes 3 to 8 s, and three times that in bad company.
pytestmark = pytest.mark.timeout(240)
BOOT_S = 90
SOURCES = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyImage:
    return build_tiny(tmp_path_factory.mktemp("tiny"), print)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "qemu.log"


def user_network(port: int) -> list[str]:
    return [
        *("-netdev", f"user,id=n0,hostfwd=tcp:127.0.0.1:{port}-:8000"),
        *("-device", "virtio-net-pci,netdev=n0,romfile="),
    ]


def boot_way(way: str, tiny: TinyImage, tmp_path: Path) -> list[str | Path]:
    # A copy, since the guest writes to its own partition.
    disk = shutil.copy(tiny.disk, tmp_path / "disk.raw")
    drive = ["-drive", f"if=none,id=d0,format={tiny.disk_format},file={disk}"]
    on_virtio = [*drive, "-device", "virtio-blk-pci,drive=d0"]
    match way:
        case "bios":
            return [*on_virtio]
        case "scsi":
            return [*drive, "-device", "virtio-scsi-pci", "-device", "scsi-hd,drive=d0"]
        case "ahci":
            return [*drive, "-device", "ide-hd,drive=d0"]
        case "uefi":
            firmware = find_uefi()
            store = shutil.copy(firmware.vars_template, tmp_path / "vars.fd")
            return [
                *("-drive", f"if=pflash,format=raw,readonly=on,file={firmware.code}"),
                *("-drive", f"if=pflash,format=raw,file={store}"),
                *on_virtio,
            ]
    return [
        *("-kernel", tiny.kernel, "-initrd", tiny.initramfs),
        *("-append", RESCUE_ARGUMENTS if way == "rescue" else KERNEL_ARGUMENTS),
        *on_virtio,
    ]


@pytest.mark.parametrize("way", ["bios", "uefi", "kernel", "scsi", "ahci"])
def test_it_boots_and_answers_and_obeys_the_power_button(
    way: str, tiny: TinyImage, tmp_path: Path, log: Path
) -> None:
    port = find_free_port()
    arguments = boot_way(way, tiny, tmp_path)
    with start_qemu(*arguments, "-vga", "std", *user_network(port), log=log) as machine:
        ready_s = machine.wait_serial("ready at 10.0.2.15", BOOT_S)
        assert wait_answer("127.0.0.1", port) == "lumed tiny tiny 10.0.2.15\n"
        answer_s = machine.elapsed_s()
        assert plain_answer("127.0.0.1", port) == "lumed tiny tiny 10.0.2.15\n"
        assert f"lumed tiny {tiny.version} ready" in machine.serial
        machine.monitor.ask("system_powerdown")
        machine.wait_serial("lumed: powering off")
        off_s = machine.elapsed_s()
        assert machine.wait_end() == 0
        assert machine.elapsed_s() - off_s < 3
    print(f"{way}: byte {machine.first_byte_s:.2f} ready {ready_s:.2f} answer {answer_s:.2f} s")


def test_the_agent_tells_addresses_and_runs_commands_and_shuts_down(
    tiny: TinyImage, tmp_path: Path, log: Path
) -> None:
    arguments = boot_way("kernel", tiny, tmp_path)
    with start_qemu(*arguments, *user_network(find_free_port()), log=log) as machine:
        machine.wait_serial("ready at", BOOT_S)
        machine.ask_agent("guest-ping")
        cards = machine.ask_agent("guest-network-get-interfaces")
        addresses = [a["ip-address"] for card in cards for a in card.get("ip-addresses", [])]
        assert "10.0.2.15" in addresses
        assert machine.run_in_guest("uname -s; wget 2>&1 | head -1").startswith("Linux\nBusyBox")
        machine.ask_agent("guest-set-user-password", username="lume", password="c2VjcmV0",
                          crypted=False)  # fmt: skip
        assert re.search(r"lume:\$6\$", machine.run_in_guest("cat /etc/shadow"))
        machine.agent.send("guest-shutdown")
        assert machine.wait_end() == 0


def test_a_person_can_type_commands_on_the_serial_port(
    tiny: TinyImage, tmp_path: Path, log: Path
) -> None:
    with start_qemu(*boot_way("kernel", tiny, tmp_path), log=log) as machine:
        machine.wait_serial("ready at no address", BOOT_S)
        machine.wait_serial("tiny:~# ")
        machine.type_line("echo $((6 * 7))-$(whoami)")
        machine.wait_serial("42-root")
        machine.type_line("exit")
        machine.wait_serial("built-in shell", times=2)
        machine.wait_serial("tiny:~# ", times=3)
        machine.type_line("echo $((7 * 7))-again")
        machine.wait_serial("49-again")


def test_what_it_writes_to_its_disk_is_there_at_the_next_boot(
    tiny: TinyImage, tmp_path: Path, log: Path
) -> None:
    arguments = boot_way("bios", tiny, tmp_path)
    for script in ("echo kept >/disk/note", "cat /disk/note"):
        with start_qemu(*arguments, log=log) as machine:
            machine.wait_serial("ready at", BOOT_S)
            said = machine.run_in_guest(script)
            machine.monitor.ask("system_powerdown")
            assert machine.wait_end() == 0
    assert said == "kept\n"


def test_the_rescue_system_names_the_disk_and_leaves_a_shell(
    tiny: TinyImage, tmp_path: Path, log: Path
) -> None:
    with start_qemu(*boot_way("rescue", tiny, tmp_path), log=log) as machine:
        machine.wait_serial("lumed rescue: the VM's disk is /dev/vda\r\n", BOOT_S)
        machine.wait_serial("lumed rescue: /dev/vda1 130048 KiB")
        machine.wait_serial("tiny:~# ")
        machine.type_line("mkdir -p /mnt/d; mount -o ro /dev/vda1 /mnt/d && ls /mnt/d")
        machine.wait_serial("syslinux.cfg")


@pytest.mark.parametrize(("way", "vga"), [("bios", "std"), ("bios", "virtio"), ("uefi", "virtio")])
def test_the_screen_shows_the_ready_line(
    way: str, vga: str, tiny: TinyImage, tmp_path: Path, log: Path
) -> None:
    arguments = boot_way(way, tiny, tmp_path)
    with start_qemu(*arguments, "-vga", vga, log=log) as machine:
        machine.wait_serial("ready at", BOOT_S)
        machine.wait_serial("# ")
        before = take_screenshot(machine, tmp_path)
        assert count_lit(before) > 500  # a line of text lights some thousand pixels
        machine.run_in_guest("seq 1 40 >/dev/tty1")
        assert count_lit(take_screenshot(machine, tmp_path)) != count_lit(before)


def take_screenshot(machine: RawQemu, tmp_path: Path) -> bytes:
    machine.monitor.ask("screendump", filename=str(tmp_path / "screen.ppm"))
    return (tmp_path / "screen.ppm").read_bytes()


def count_lit(ppm: bytes) -> int:
    match = re.match(rb"P6\s\d+ \d+\s255\s", ppm)
    assert match
    return sum(value > 128 for value in ppm[match.end() :: 3])


def test_over_passt_it_reads_its_seed_and_mounts_its_share(
    tiny: TinyImage, tmp_path: Path, log: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "hello").write_text("from the host\n")
    seed = tmp_path / "seed.iso"
    seed.write_bytes(make_iso({"meta-data": META_DATA, "user-data": USER_DATA}))
    with (
        share(shared, tmp_path) as share_arguments,
        passt(tmp_path) as (address, card, fd),
        start_qemu(
            *boot_way("bios", tiny, tmp_path),
            *("-drive", f"if=virtio,format=raw,readonly=on,file={seed}"),
            *share_arguments,
            *card,
            log=log,
            pass_fds=[fd],
        ) as machine,
    ):
        machine.wait_serial("lumed: mounted data at /mnt/shared/data", BOOT_S)
        machine.wait_serial("done, all", BOOT_S)
        assert wait_answer(address, 8000).startswith("lumed tiny web-1 ")
        assert (shared / "copy").read_text() == "from the host\n"
        machine.monitor.ask("system_powerdown")
        assert machine.wait_end() == 0


META_DATA = """\
instance-id: "1"
local-hostname: "web-1"
mounts:
- ["data", "/mnt/shared/data", "virtiofs", "rw,nofail", "0", "0"]
"""
USER_DATA = """\
#cloud-config
password: lume
runcmd:
- cp /mnt/shared/data/hello /mnt/shared/data/copy
- [sh, -c, "echo 'done, all'"]
"""


def plain_answer(address: str, port: int) -> str:
    """What a client gets that sends nothing.

    Not over passt 2023-03: it ends the guest's handshake only when the client sends something.
    """
    with socket.create_connection((address, port), timeout=20) as client:
        return client.makefile().read()


def make_iso(files: dict[str, str]) -> bytes:
    iso = PyCdlib()
    iso.new(vol_ident="cidata", joliet=3, rock_ridge="1.09")
    for name, text in files.items():
        content = text.encode()
        iso.add_fp(
            io.BytesIO(content),
            len(content),
            iso_path=f"/{name.replace('-', '').upper()}.;1",
            rr_name=name,
            joliet_path=f"/{name}",
        )
    image = io.BytesIO()
    iso.write_fp(image)
    iso.close()
    return image.getvalue()


@contextlib.contextmanager
def share(directory: Path, tmp_path: Path) -> Iterator[list[str]]:
    listener = socket.socket(socket.AF_UNIX)
    path = tmp_path / "fs.sock"
    listener.bind(str(path))
    listener.listen()
    with listener:
        process = subprocess.Popen(
            ["/usr/lib/qemu/virtiofsd", f"--fd={listener.fileno()}", "-o", f"source={directory}"],
            pass_fds=[listener.fileno()],
            stderr=subprocess.DEVNULL,
        )
    try:
        yield [
            *(
                "-object",
                "memory-backend-memfd,id=m0,size=256M,share=on",
                "-numa",
                "node,memdev=m0",
            ),
            *("-chardev", f"socket,id=fs,path={path}"),
            *("-device", "vhost-user-fs-pci,chardev=fs,tag=data"),
        ]
    finally:
        process.kill()
        process.wait(10)


@contextlib.contextmanager
def passt(tmp_path: Path) -> Iterator[tuple[str, list[str], int]]:
    """A passt whose forwarded address is returned with QEMU's arguments and the descriptor."""
    address = "127.77.77.8"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            [
                *("passt", "-f", "-q", "-F", str(theirs.fileno()), "--no-map-gw"),
                *("-t", f"{address}/8000", "-l", str(tmp_path / "passt.log")),
            ],
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        try:
            fd = ours.fileno()
            netdev = f"stream,id=n0,server=off,addr.type=fd,addr.str={fd}"
            yield address, ["-netdev", netdev, "-device", "virtio-net-pci,netdev=n0,romfile="], fd
        finally:
            process.kill()
            process.wait(10)


def test_another_user_than_root_builds_the_same_bytes(tiny: TinyImage, tmp_path: Path) -> None:
    # Another user cannot enter pytest's directories, nor root's Python.
    copy, output = tmp_path / "src", tmp_path / "output"
    shutil.copytree(SOURCES, copy)
    output.mkdir()
    output.chmod(0o777)
    script = f"from lumed.images.tiny import *; print(build_tiny(Path({str(output)!r})).version)"
    with contextlib.ExitStack() as stack:
        for directory in (tmp_path, *tmp_path.parents):
            mode = directory.stat().st_mode
            if mode & 0o005 != 0o005:
                stack.callback(directory.chmod, mode)
                directory.chmod(mode | 0o005)
        built = subprocess.run(
            [
                *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
                *("env", "-i", "PATH=/usr/bin:/bin:/usr/sbin:/sbin", f"PYTHONPATH={copy}"),
                *("PYTHONDONTWRITEBYTECODE=1", "/usr/bin/python3", "-c", script),
            ],
            capture_output=True,
            text=True,
            timeout=200,
        )
    assert built.returncode == 0, built.stderr
    assert built.stdout.strip() == tiny.version
    for path in (tiny.disk, tiny.kernel, tiny.initramfs):
        assert (output / path.name).read_bytes() == path.read_bytes()
    assert sorted(p.name for p in output.iterdir()) == ["disk.raw", "initramfs", "vmlinuz"]


async def test_two_servers_that_build_it_at_once_share_one_image(tmp_path: Path) -> None:
    stages: list[str] = []
    caches = [ImageCache(tmp_path / "images", {"tiny": builtin_tiny()}) for _ in range(2)]
    first, second = await asyncio.gather(
        *(cache.get_builtin("tiny", lambda stage, *_: stages.append(stage)) for cache in caches)
    )
    assert first == second
    assert first.facts.format is DiskFormat.RAW
    assert sorted(p.name for p in first.disk.parent.iterdir()) == [
        *("disk.raw", "image.json", "initramfs", "vmlinuz")
    ]
    assert stages.count("Writing the disk") == 2
    assert await caches[0].get_builtin("tiny", lambda *_: stages.append("again")) == first
    assert "again" not in stages
