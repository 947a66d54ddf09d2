"""An arm64 guest for x86_64 hosts, of Debian's packages: kernel, BusyBox and a shell script.

apt gets lists and cache of its own, so that the host's packages stay as they are: nothing is
installed, and no foreign architecture is added.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from lumed.images.debs import unpack_packages
from lumed.images.initramfs import Archive, read_modules

MENU = "the guest waits for Enter"
READY = "arm64 guest ready on aarch64"
_PACKAGES = ("busybox-static", "systemd-boot-efi")
_DISK_BYTES = 48 << 20

_APT_CONF = """\
APT::Architecture "arm64";
APT::Architectures "arm64";
APT::Sandbox::User "root";
Acquire::Languages "none";
Dir::Etc::sourcelist "{folder}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::State::lists "{folder}/lists";
Dir::State::status "/dev/null";
Dir::Cache "{folder}/cache";
"""
# Container images tell apt to parse its lists anew each time, which takes seconds.
_KEEP_CACHE = (
    *("-o", "Dir::Cache::pkgcache=pkgcache.bin"),
    *("-o", "Dir::Cache::srcpkgcache=srcpkgcache.bin"),
)
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
for module in MODULES; do insmod /modules/$module.ko; done
acpid -l /dev/null
echo "arm64 guest ready on $(uname -m)"
exec sh
"""
_POWER_BUTTON = """#!/bin/busybox sh
echo "power button pressed" > /dev/console
poweroff -f
"""
_ENTRY = """\
title {menu}
linux /vmlinuz
initrd /initramfs
options console=ttyAMA0 quiet
"""


def build_arm64_disk(folder: Path) -> Path:
    """A raw disk that boots by UEFI: MENU waits for Enter or 20 s, then comes READY."""
    root = folder / "root"
    unpack_packages(_fetch(folder), root)
    initramfs = folder / "initramfs"
    initramfs.write_bytes(_build_initramfs(root))
    disk = folder / "arm64.raw"
    with disk.open("wb") as file:
        file.truncate(_DISK_BYTES)

    def run(name: str, *arguments: str | Path, stdin: bytes | None = None) -> None:
        _run([name, "-i", disk, *arguments], stdin=stdin)

    run("mformat", "-T", str(_DISK_BYTES // 512), "-h", "64", "-s", "32", "::")
    run("mmd", "::/EFI", "::/EFI/BOOT", "::/loader", "::/loader/entries")
    loader = root / "usr/lib/systemd/boot/efi/systemd-bootaa64.efi"
    run("mcopy", next(root.glob("boot/vmlinuz-*")), "::/vmlinuz")
    run("mcopy", initramfs, "::/initramfs")
    run("mcopy", loader, "::/EFI/BOOT/BOOTAA64.EFI")
    run("mcopy", "-", "::/loader/loader.conf", stdin=b"timeout 20\n")
    run("mcopy", "-", "::/loader/entries/guest.conf", stdin=_ENTRY.format(menu=MENU).encode())
    return disk


def _fetch(folder: Path) -> list[Path]:
    words = "$(ORIGIN) $(REPO_URI) $(RELEASE) $(COMPONENT)"
    targets = _run(["apt-get", "indextargets", "--format", words, "Identifier: Packages"])
    sources = [
        f"deb [signed-by={_KEYRING}] {' '.join(words[1:])}\n"
        for words in map(str.split, targets.splitlines())
        if words[0] == "Debian" and words[-1] == "main"
    ]
    assert sources, "apt on this host knows no archive of Debian"
    (folder / "sources.list").write_text("".join(sources))
    for name in ("lists/partial", "cache/archives/partial", "debs"):
        (folder / name).mkdir(parents=True)
    (folder / "apt.conf").write_text(_APT_CONF.format(folder=folder))
    env = os.environ | {"APT_CONFIG": str(folder / "apt.conf")}

    def apt(*argv: str) -> str:
        return _run([*argv, *_KEEP_CACHE], env=env, cwd=folder / "debs")

    apt("apt-get", "-qq", "update")
    depends = apt("apt-cache", "depends", "--important", "linux-image-cloud-arm64")
    kernel = depends.split("Depends: ")[1].split()[0]
    apt("apt-get", "-qq", "download", kernel, *_PACKAGES)
    return sorted((folder / "debs").glob("*.deb"))


def _build_initramfs(root: Path) -> bytes:
    archive = Archive()
    for name in ("dev", "proc", "sys"):
        archive.add_directory(name)
    archive.add_character_device("dev/console", 5, 1)
    archive.add_file("bin/busybox", (root / "bin/busybox").read_bytes(), 0o755)
    modules = dict.fromkeys(m for found in read_modules(root, ["evdev"]).values() for m in found)
    for module in modules:
        archive.add_file(f"modules/{module.name}.ko", module.content)
    names = " ".join(module.name for module in modules)
    archive.add_file("init", _INIT.replace("MODULES", names).encode(), 0o755)
    # BusyBox's acpid runs this for ACPI's power button.
    archive.add_file("etc/acpi/PWRF/00000080", _POWER_BUTTON.encode(), 0o755)
    return archive.data()


def _run(
    argv: list[str | Path],
    *,
    stdin: bytes | None = None,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    done = subprocess.run(
        argv, input=stdin, env=env, cwd=cwd, check=True, timeout=120, capture_output=True
    )
    return done.stdout.decode()
