"""How to reach a machine, and how the last one ended."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumed.errors import Damaged
from lumed.model.end import EndCause, MachineEnd
from lumed.model.run import AttachedDisk, Forward, RunOptions, SharedDirectory, VncMode
from lumed.model.vm import DiskFormat
from lumed.osproc import ProcessId
from lumed.store.runrecord import (
    RunRecord,
    read_end_record,
    read_run_record,
    write_end_record,
    write_run_record,
)

RECORD = RunRecord(
    uuid="8c5f5b1e-0f4d-4a7e-9a30-4c1f6b0c2f11",
    runtime_dir="/home/me/.lume/run/8c5f5b1e0f4d4a7e",
    accelerator="tcg",
    network="nat",
    mac_address="52:54:00:12:34:56",
    options=RunOptions(
        no_display=False,
        shared_directories=(SharedDirectory("/srv/ä", True, "share-2"),),
        recovery_mode=True,
        mount="/iso",
        network="nat",
        vnc=VncMode.DISABLED,
        vnc_port=5950,
        vnc_password="secret12",
        disks=(AttachedDisk("/srv/a.img", DiskFormat.RAW),),
        usb_storage=(AttachedDisk("/srv/b.qcow2", DiskFormat.QCOW2),),
    ),
    started_at="2026-11-24T12:00:00.000Z",
    process=ProcessId("boot", 4711, 99),
    address="127.77.0.5",
    forwards=(Forward(22, "127.77.0.5", 10022), Forward(53, "127.77.0.5", 53, "udp")),
    vnc_port=5901,
    vnc_password="secret12",
    problems=("one", "two"),
    stop_requested=True,
)
END = MachineEnd(EndCause.CRASHED, "QEMU was killed by signal 9", "2026-11-24T12:00:00.000Z")


def test_a_run_record_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    assert read_run_record(path) is None
    for record in (RECORD, replace(RECORD, process=None, options=RunOptions(), forwards=())):
        write_run_record(path, record)
        assert read_run_record(path) == record
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_record_of_an_older_version_has_no_further_disks(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_run_record(path, RECORD)
    data = json.loads(path.read_bytes())
    for key in ("disks", "usb_storage", "vnc_port", "vnc_password"):
        del data["options"][key]
    path.write_text(json.dumps(data))
    record = read_run_record(path)
    assert record is not None
    assert (record.options.disks, record.options.vnc_port) == ((), None)


@pytest.mark.parametrize("cause", EndCause)
def test_an_end_comes_back_as_it_was(tmp_path: Path, cause: EndCause) -> None:
    path = tmp_path / "end.json"
    assert read_end_record(path) is None
    end = replace(END, cause=cause, step="quit")
    write_end_record(path, end)
    assert read_end_record(path) == end


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"options": []}']
)
def test_a_torn_record_is_damage_and_a_torn_end_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(Damaged, match=str(path)):
        read_run_record(path)
    assert read_end_record(path) is None


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted(asdict(RECORD))), _JSON, max_size=3))
def test_any_change_of_a_record_is_a_record_or_damage(changes: dict[str, object]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        path.write_text(json.dumps(asdict(RECORD) | changes))
        with contextlib.suppress(Damaged):
            assert isinstance(read_run_record(path), RunRecord)


@given(st.dictionaries(st.sampled_from(sorted(asdict(END))), _JSON, max_size=3))
def test_any_change_of_an_end_is_an_end_or_none(changes: dict[str, object]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "end.json"
        path.write_text(json.dumps(asdict(END) | changes))
        assert isinstance(read_end_record(path), MachineEnd | None)
