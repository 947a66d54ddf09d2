"""`run.json` and `end.json`: how to reach a machine, and how the last one ended."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lumed.errors import Damaged
from lumed.files import read_json_object, write_json
from lumed.model.end import EndCause, MachineEnd
from lumed.model.run import AttachedDisk, Forward, RunOptions, SharedDirectory, VncMode
from lumed.model.vm import DiskFormat
from lumed.osproc import ProcessId


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What the next server needs to find a machine again.

    process is None until QEMU was started: with the lock held, such a record means that the
    server was killed in between, and the holder of the lock is the machine.
    """

    uuid: str
    runtime_dir: str
    accelerator: str
    network: str
    mac_address: str
    options: RunOptions
    started_at: str
    process: ProcessId | None = None
    address: str | None = None
    forwards: tuple[Forward, ...] = ()
    vnc_port: int | None = None
    vnc_password: str | None = None
    problems: tuple[str, ...] = ()
    stop_requested: bool = False


def write_run_record(path: Path, record: RunRecord) -> None:
    """Replace the record atomically (mode 0600: it holds the VNC password)."""
    write_json(path, asdict(record))


def read_run_record(path: Path) -> RunRecord | None:
    """The record, None if there is none. Raises Damaged."""
    try:
        data: dict[str, Any] = read_json_object(path)
        options = data["options"]
        process = data["process"]
        return RunRecord(
            **{
                **data,
                "options": RunOptions(
                    **{
                        **options,
                        "shared_directories": tuple(
                            SharedDirectory(**share) for share in options["shared_directories"]
                        ),
                        "vnc": VncMode(options["vnc"]),
                        "disks": _disks(options.get("disks", ())),
                        "usb_storage": _disks(options.get("usb_storage", ())),
                    }
                ),
                "process": None if process is None else ProcessId(**process),
                "forwards": tuple(Forward(**forward) for forward in data["forwards"]),
                "problems": tuple(data["problems"]),
            }
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise Damaged(f"{path} cannot be read: {error}") from error


def _disks(items: Any) -> tuple[AttachedDisk, ...]:
    return tuple(AttachedDisk(item["path"], DiskFormat(item["format"])) for item in items)


def write_end_record(path: Path, end: MachineEnd) -> None:
    """Replace the record of the last end."""
    write_json(path, asdict(end))


def read_end_record(path: Path) -> MachineEnd | None:
    """How the last machine ended; None if there was none or the record cannot be read."""
    try:
        data: dict[str, Any] = read_json_object(path)
        return MachineEnd(**{**data, "cause": EndCause(data["cause"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
