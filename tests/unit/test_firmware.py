import json
from pathlib import Path

import pytest

from lumed.errors import MissingDependency
from lumed.machine.qemu.firmware import UefiFirmware, find_uefi
from lumed.model.vm import Architecture


def add(root: Path, *names: str) -> list[Path]:
    paths = [root / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return paths


def describe(
    root: Path,
    name: str,
    features: list[str],
    machine: str = "pc-q35-*",
    architecture: str = "x86_64",
) -> UefiFirmware:
    code, variables = add(root, f"usr/fw/{name}.code", f"usr/fw/{name}.vars")
    text = {
        "interface-types": ["uefi"],
        "mapping": {
            "device": "flash",
            "executable": {"filename": f"/usr/fw/{name}.code", "format": "raw"},
            "nvram-template": {"filename": f"/usr/fw/{name}.vars", "format": "raw"},
        },
        "targets": [{"architecture": architecture, "machines": [machine]}],
        "features": features,
    }
    (descriptor,) = add(root, f"usr/share/qemu/firmware/{name}.json")
    descriptor.write_text(json.dumps(text))
    return UefiFirmware(code, variables)


def test_the_4m_build_without_secure_boot_comes_first(tmp_path: Path) -> None:
    folder = "usr/share/OVMF"
    add(tmp_path, f"{folder}/OVMF_CODE.fd", f"{folder}/OVMF_VARS.fd")
    add(tmp_path, f"{folder}/OVMF_CODE_4M.secboot.fd")
    pair = add(tmp_path, f"{folder}/OVMF_CODE_4M.fd", f"{folder}/OVMF_VARS_4M.fd")
    assert find_uefi(tmp_path) == UefiFirmware(*pair)


def test_half_a_pair_is_passed_over(tmp_path: Path) -> None:
    add(tmp_path, "usr/share/OVMF/OVMF_CODE_4M.fd")
    pair = add(tmp_path, "usr/share/OVMF/OVMF_CODE.fd", "usr/share/OVMF/OVMF_VARS.fd")
    assert find_uefi(tmp_path) == UefiFirmware(*pair)


def test_elsewhere_the_descriptors_tell(tmp_path: Path) -> None:
    describe(tmp_path, "10-secure", ["secure-boot", "requires-smm"])
    describe(tmp_path, "20-microvm", [], machine="microvm")
    add(tmp_path, "usr/share/qemu/firmware/30-damaged.json")
    wanted = describe(tmp_path, "40-plain", ["acpi-s3"])
    describe(tmp_path, "50-other", [])
    assert find_uefi(tmp_path) == wanted


def test_no_firmware_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(MissingDependency) as error:
        find_uefi(tmp_path)
    assert error.value.hint == "sudo apt-get install ovmf"


def test_arm64_has_firmware_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(MissingDependency) as error:
        find_uefi(tmp_path, architecture=Architecture.ARM64)
    assert error.value.hint == "sudo apt-get install qemu-efi-aarch64"
    describe(tmp_path, "10-pc", [])
    describe(tmp_path, "15-riscv", [], machine="virt-*", architecture="riscv64")
    described = describe(tmp_path, "20-arm", [], machine="virt-*", architecture="aarch64")
    assert find_uefi(tmp_path, architecture=Architecture.ARM64) == described
    pair = add(tmp_path, "usr/share/AAVMF/AAVMF_CODE.fd", "usr/share/AAVMF/AAVMF_VARS.fd")
    assert find_uefi(tmp_path, architecture=Architecture.ARM64) == UefiFirmware(*pair)
