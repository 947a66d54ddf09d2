import shutil
import subprocess
from pathlib import Path

import pytest

from lumed.machine.qemu import longmode

SOURCE = Path(longmode.__file__).with_name("longmode.S")


@pytest.mark.skipif(shutil.which("as") is None, reason="binutils are not installed")
def test_the_bytes_are_what_the_assembly_says(tmp_path: Path) -> None:
    built = tmp_path / "longmode.o", tmp_path / "longmode.bin"
    subprocess.run(["as", "--64", SOURCE, "-o", built[0]], check=True, timeout=20)
    subprocess.run(
        ["ld", "-Ttext=0xf0000", "--oformat=binary", built[0], "-o", built[1]],
        check=True,
        timeout=20,
    )
    assert built[1].read_bytes() == longmode.PROGRAM


def test_every_step_of_the_program_has_a_name_in_order() -> None:
    said = [line.split("'")[1] for line in SOURCE.read_text().splitlines() if "say     '" in line]
    assert said == list(longmode.STEPS)
