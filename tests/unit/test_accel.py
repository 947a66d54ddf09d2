from pathlib import Path

import pytest

from lumed.errors import InvalidField
from lumed.machine.qemu.accel import accel_args, find_accelerator, find_obstacle
from lumed.model.host import Accelerator
from lumed.model.vm import Architecture

AMD64, ARM64 = Architecture.AMD64, Architecture.ARM64
QEMU = Path("/usr/bin/qemu-system-x86_64")


@pytest.fixture(autouse=True)
def _x86_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


def test_a_host_without_kvm_says_so_and_how_to_get_it(tmp_path: Path) -> None:
    found = find_obstacle(QEMU, tmp_path / "kvm")
    assert found is not None
    assert found.name == "tcg"
    assert found.reason == f"{tmp_path}/kvm: no such file or directory"
    assert "modprobe kvm_" in str(found.hint)


def test_a_forbidden_kvm_says_who_may_allow_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = tmp_path / "kvm"
    device.touch(mode=0o600)

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.open", refuse)
    found = find_obstacle(QEMU, device)
    assert found is not None
    assert found.reason == f"{device}: permission denied"
    assert found.hint == f"sudo setfacl -m u:$USER:rw {device}"


def test_another_processor_means_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    found = find_obstacle(QEMU, Path("/dev/null"))
    assert found is not None
    assert found.name == "tcg"
    assert "aarch64" in found.reason


def test_a_device_that_opens_is_no_obstacle() -> None:
    assert find_obstacle(QEMU, Path("/dev/null")) is None


@pytest.mark.parametrize("name", ["kvm", "tcg"])
async def test_an_override_is_taken_without_a_look(name: str, tmp_path: Path) -> None:
    found = await find_accelerator(tmp_path, tmp_path / "no-qemu", override=name)
    assert found.name == name
    assert "LUME_ACCEL" in found.reason
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("override", ["kvm", "tcg", None])
async def test_another_processor_is_emulated_whatever_the_settings_say(
    override: str | None, tmp_path: Path
) -> None:
    found = await find_accelerator(tmp_path, Path("/bin/qemu-system-aarch64"), override=override)
    assert found.name == "tcg"
    assert "runs guests of another kind than this x86_64 host" in found.reason


async def test_an_unknown_override_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match="'hvf'"):
        await find_accelerator(tmp_path, QEMU, override="hvf")


def test_the_arguments_name_one_accelerator_and_its_processor() -> None:
    assert accel_args(Accelerator("kvm", ""), AMD64) == ["-accel", "kvm", "-cpu", "host"]
    assert accel_args(Accelerator("tcg", ""), AMD64) == [
        "-accel",
        "tcg,thread=multi",
        "-cpu",
        "max",
    ]


def test_an_arm64_guest_gets_a_processor_of_its_own_kind() -> None:
    arguments = ["-accel", "tcg,thread=multi", "-cpu", "cortex-a72"]
    assert accel_args(Accelerator("tcg", ""), ARM64) == arguments
