"""libvirt, where it is installed, with a guest like lumed's."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import IO

from bench.sampling import ms_since, wait_for_bytes

_PYTHON = "/usr/bin/python3"
_PROGRAM = Path(__file__).with_name("libvirt_peer.py")
_NOBODY = 65534

_XML = """<domain type='{kind}'>
 <name>bench</name><memory unit='MiB'>256</memory><vcpu>1</vcpu>
 <os><type arch='x86_64' machine='q35'>hvm</type></os>
 <features><acpi/><apic/></features><cpu mode='maximum'/>
 <devices>
  <disk type='file' device='disk'>
   <driver name='qemu' type='qcow2'/><source file='{root}/disk.qcow2'/>
   <target dev='vda' bus='virtio'/>
  </disk>
  <serial type='file'><source path='{root}/serial.log'/></serial>
  <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
  <interface type='user'><model type='virtio'/><rom enabled='no'/></interface>
  <input type='keyboard' bus='virtio'/><input type='tablet' bus='virtio'/>
  <video><model type='vga'/></video>
  <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
 </devices>
</domain>
"""


def has_libvirt() -> bool:
    """Whether the QEMU driver and its Python binding are installed."""
    driver = list(Path("/usr/lib").glob("*/libvirt/connection-driver/libvirt_driver_qemu.so"))
    command = [_PYTHON, "-c", "import libvirt"]
    return bool(driver) and subprocess.run(command, capture_output=True).returncode == 0


class Libvirt:
    """One domain of an embedded libvirt, as an unprivileged user. Close it in the end."""

    def __init__(self, directory: Path, base: Path, accelerator: str) -> None:
        self._serial = directory / "serial.log"
        (directory / "etc").mkdir(parents=True)
        (directory / "etc/qemu.conf").write_text('stdio_handler = "file"\n')
        # Its user may not look into the home, so it has a copy of the image.
        program = shutil.copy(_PROGRAM, directory / "peer.py")
        subprocess.run(["cp", "--sparse=always", base, directory / "base.raw"], check=True)
        overlay = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b"]
        disk = [str(directory / "base.raw"), str(directory / "disk.qcow2"), "1G"]
        subprocess.run([*overlay, *disk], check=True)
        xml = directory / "domain.xml"
        kind = "kvm" if accelerator == "kvm" else "qemu"
        xml.write_text(_XML.format(kind=kind, root=directory))
        user = _NOBODY if os.getuid() == 0 else None
        if user is not None:
            for path in (directory, *directory.rglob("*")):
                os.chown(path, user, user)
        self._log = (directory / "log.txt").open("wb")
        places = {"HOME": str(directory), "XDG_RUNTIME_DIR": str(directory)}
        self._process = subprocess.Popen(
            [_PYTHON, program, directory, xml],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=directory,
            env={"PATH": os.environ["PATH"], **places},
            user=user,
            group=user,
            extra_groups=None if user is None else [],
        )
        self._read_line()

    def run_once(self) -> tuple[float, float, float]:
        """Milliseconds until `start` returned, until the first serial byte, and of `destroy`."""
        self._serial.unlink(missing_ok=True)
        started = time.perf_counter()
        self._write_line("start")
        self._read_line()
        start_ms = ms_since(started)
        wait_for_bytes(self._serial)
        first_byte_ms = ms_since(started)
        started = time.perf_counter()
        self._write_line("stop")
        self._read_line()
        return start_ms, first_byte_ms, ms_since(started)

    def close(self) -> None:
        """End the domain and the driver."""
        self._pipe(self._process.stdin).close()
        try:
            self._process.wait(20)
        finally:
            self._process.kill()
            self._process.wait()
            self._pipe(self._process.stdout).close()
            self._log.close()

    def _write_line(self, word: str) -> None:
        print(word, file=self._pipe(self._process.stdin), flush=True)

    def _read_line(self) -> str:
        line = self._pipe(self._process.stdout).readline()
        if not line:
            raise RuntimeError(f"libvirt ended: {Path(self._log.name).read_text()[-500:]}")
        return line

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        if pipe is None:
            raise RuntimeError("no pipe")
        return pipe
