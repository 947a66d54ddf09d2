"""Operations: they run whoever waits, and leave a trace on disk."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lumed.errors import MachineFailed, NotFound, WrongState
from lumed.files import write_json
from lumed.model.operation import Operation, OperationStatus
from lumed.service import operations as module
from lumed.service import tasks as tasks_module
from lumed.service.operations import Operations, RunningOperation
from lumed.service.tasks import TaskOwner


@pytest.fixture
async def tasks() -> AsyncIterator[TaskOwner]:
    owner = TaskOwner()
    yield owner
    await owner.close()


@pytest.fixture
def operations(tmp_path: Path, tasks: TaskOwner) -> Operations:
    return Operations(tmp_path, tasks)


async def nothing(_: RunningOperation) -> None:
    pass


async def for_ever(_: RunningOperation) -> None:
    await asyncio.Event().wait()


async def loaded(directory: Path, tasks: TaskOwner) -> Operations:
    """What the next server knows."""
    operations = Operations(directory, tasks)
    await operations.load()
    return operations


async def run(operations: Operations, target: str = "web") -> Operation:
    operation = await operations.start("create", target, nothing)
    return await operations.wait(operation.id, 5)


async def test_an_operation_tells_its_stages_and_its_end(
    operations: Operations, tmp_path: Path, tasks: TaskOwner
) -> None:
    go_on = asyncio.Event()

    async def work(handle: RunningOperation) -> None:
        handle.stage("copying")
        handle.report("copying", 5, 10)
        await go_on.wait()

    begun = await operations.start("create", "web", work)
    assert (begun.status, begun.stage) == (OperationStatus.RUNNING, "starting")
    assert json.loads((tmp_path / f"{begun.id}.json").read_text())["status"] == "running"
    assert operations.find_running("web") == begun.id
    waited = await operations.wait(begun.id, 0.01)
    assert not waited.is_over
    assert (waited.stage, waited.bytes_done, waited.bytes_total) == ("copying", 5, 10)
    go_on.set()
    over = await operations.wait(begun.id, 5)
    assert (over.status, over.stage, over.error) == (OperationStatus.SUCCEEDED, "over", None)
    assert over.ended_at is not None
    assert over.ended_at >= over.started_at
    assert operations.find_running("web") is None
    assert (await loaded(tmp_path, tasks)).get(begun.id) == over


async def test_a_failure_is_kept_as_it_was(
    operations: Operations, tmp_path: Path, tasks: TaskOwner
) -> None:
    async def fail(_: RunningOperation) -> None:
        raise MachineFailed("no accelerator", hint="buy one")

    over = await operations.wait((await operations.start("run", "web", fail)).id, 5)
    assert over.status is OperationStatus.FAILED
    assert over.error is not None
    assert asdict(over.error) == {
        "code": "machine_failed",
        "message": "no accelerator",
        "hint": "buy one",
    }
    assert isinstance(operations.get_failure(over.id), MachineFailed)
    assert operations.find_last("web", "run") == over
    assert (await loaded(tmp_path, tasks)).get(over.id) == over


async def test_a_fault_of_ours_ends_the_operation_and_nothing_else(operations: Operations) -> None:
    async def divide(_: RunningOperation) -> None:
        raise ZeroDivisionError("by zero")

    over = await operations.wait((await operations.start("run", "web", divide)).id, 5)
    assert over.status is OperationStatus.FAILED
    assert over.error is not None
    assert (over.error.code, over.error.message) == ("internal", "ZeroDivisionError: by zero")
    assert (await run(operations)).status is OperationStatus.SUCCEEDED


async def test_a_cancelled_operation_has_ended_when_cancel_returns(
    operations: Operations, tmp_path: Path, tasks: TaskOwner
) -> None:
    over: list[bool] = []
    cleaned = asyncio.Event()

    async def work(_: RunningOperation) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.set()

    begun = await operations.start("create", "web", work, on_over=lambda: over.append(True))
    await asyncio.sleep(0)
    cancelled = await operations.cancel(begun.id)
    assert cancelled.status is OperationStatus.CANCELLED
    assert cleaned.is_set()
    assert over == [True]
    with pytest.raises(WrongState, match="is over: cancelled"):
        await operations.cancel(begun.id)
    assert (await loaded(tmp_path, tasks)).get(begun.id) == cancelled


async def test_a_cancel_before_the_first_step_still_ends_it(
    operations: Operations, tmp_path: Path, tasks: TaskOwner
) -> None:
    over: list[bool] = []
    begun = await operations.start("create", "web", for_ever, on_over=lambda: over.append(True))
    # No turn of the loop in between: the task has not run a line yet.
    cancelled = await operations.cancel(begun.id)
    assert cancelled.status is OperationStatus.CANCELLED
    assert over == [True]
    assert operations.find_running("web") is None
    assert (await loaded(tmp_path, tasks)).get(begun.id).status is OperationStatus.CANCELLED


async def test_what_a_killed_server_had_begun_is_interrupted(
    operations: Operations, tmp_path: Path, tasks: TaskOwner
) -> None:
    begun = await operations.start("create", "web", for_ever)
    interrupted = (await loaded(tmp_path, tasks)).get(begun.id)
    assert interrupted.status is OperationStatus.INTERRUPTED
    assert interrupted.error is not None
    assert interrupted.error.code == "interrupted"
    # Written down at once: a third server says the same, with the same time.
    assert (await loaded(tmp_path, tasks)).get(begun.id) == interrupted


async def test_the_latest_are_kept_and_the_running_ones(
    operations: Operations, tmp_path: Path, tasks: TaskOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT", 3)
    running = await operations.start("run", "long", for_ever)
    ended = [(await run(operations, f"vm{number}")).id for number in range(5)]
    kept = {operation.id for operation in operations.list_all()}
    assert kept == {running.id, *ended[-3:]}
    assert {path.stem for path in tmp_path.glob("*.json")} == kept
    with pytest.raises(NotFound, match=f"Operation not found: {ended[0]}"):
        operations.get(ended[0])
    assert len((await loaded(tmp_path, tasks)).list_all()) == 3


async def test_many_that_end_at_once_forget_old_ones_together(
    operations: Operations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT", 2)
    faults: list[object] = []
    monkeypatch.setattr(tasks_module._log, "exception", lambda *args, **_: faults.append(args))
    begun = [await operations.start("run", f"vm{number}", nothing) for number in range(40)]
    # Those that are forgotten by then are over, too.
    for operation in begun:
        with contextlib.suppress(NotFound):
            await operations.wait(operation.id, 10)
    assert not faults
    assert len(operations.list_all()) == len(list(tmp_path.glob("*.json"))) == 2


async def test_one_forgotten_while_its_end_is_written_leaves_no_file(
    operations: Operations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT", 1)
    slow = await operations.start("run", "slow", nothing)
    others_are_over = threading.Event()

    def write_slowly(file: Path, data: dict[str, Any], **options: Any) -> None:
        if file.stem == slow.id:
            others_are_over.wait(10)
        write_json(file, data, **options)

    monkeypatch.setattr(module, "write_json", write_slowly)
    newest = [await run(operations, f"vm{number}") for number in range(2)][-1]
    others_are_over.set()
    with pytest.raises(NotFound):
        await operations.wait(slow.id, 10)
    assert [path.stem for path in tmp_path.glob("*.json")] == [newest.id]


async def test_the_newest_come_first_also_of_one_millisecond(
    operations: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "utc_now", lambda: "2026-01-01T00:00:00.000Z")
    ids = [(await run(operations, f"vm{number}")).id for number in range(20)]
    assert [operation.id for operation in operations.list_all()] == ids[::-1]


async def test_operations_of_last_week_are_forgotten(
    operations: Operations, tmp_path: Path, tasks: TaskOwner
) -> None:
    operation = await run(operations)
    file = tmp_path / f"{operation.id}.json"
    file.write_text(json.dumps(asdict(operation) | {"started_at": "2020-01-01T00:00:00.000Z"}))
    assert (await loaded(tmp_path, tasks)).list_all() == []
    assert not file.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"status": "odd"},
        {"status": 3},
        {"started_at": None},
        {"error": "text"},
        {"error": {"code": "x"}},
        {"unknown": 1},
    ],
)
async def test_a_record_that_cannot_be_read_hides_no_other(
    operations: Operations, tmp_path: Path, tasks: TaskOwner, change: dict[str, object]
) -> None:
    operation = await run(operations)
    torn = tmp_path / "op-torn.json"
    torn.write_text(json.dumps(asdict(operation) | {"id": "op-torn"} | change))
    (tmp_path / "op-empty.json").touch()
    assert (await loaded(tmp_path, tasks)).list_all() == [operation]
    assert torn.exists()
