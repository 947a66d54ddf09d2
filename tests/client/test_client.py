"""The Python client against the API over fake machines, and against servers that fail."""

from __future__ import annotations

import asyncio
import inspect
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lumed import AsyncClient, Client
from lumed.client import calls
from lumed.client.calls import Call, Share
from lumed.client.errors import ServerUnreachable
from lumed.client.events import EventReader
from lumed.errors import (
    AlreadyExists,
    InvalidField,
    LumedError,
    NotFound,
    OutcomeUnknown,
    PullFailed,
    RegistryFailed,
    TimedOut,
    WrongState,
)
from lumed.store.layout import Home
from lumed.units import GIB, MIB
from tests.doubles.fake_driver import FakeDriver
from tests.http.live import serve_fake_engine


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with fake machines."""
    home = Home(tmp_path_factory.mktemp("client") / "home")
    home.prepare()
    with serve_fake_engine(home, FakeDriver()) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    """A client of it."""
    with Client(url) as client:
        yield client


def make(client: Client, name: str) -> None:
    vm = client.create_vm(name, image="tiny", cpu=1, memory="256MB", disk_size="1GB")
    assert vm.operation is not None
    client.finish_operation(vm.operation, 20)


def test_a_vm_lives_through_the_client(client: Client, tmp_path: Path) -> None:
    accepted = client.create_vm("web", image="tiny", cpu=1, memory=256 * MIB, disk_size="1GB")
    assert accepted.is_in_the_making
    assert accepted.operation is not None
    told = list(client.follow_operation(accepted.operation))
    assert told[-1].status == "succeeded"
    vm = client.get_vm("web")
    assert (vm.state, vm.cpu, vm.memory_bytes) == ("stopped", 1, 256 * MIB)
    assert vm.disk_total_bytes == GIB
    assert "web" in [vm.name for vm in client.list_vms()]

    assert client.update_vm("web", cpu=2, memory="512MB").cpu == 2
    client.run_vm("web", shared_directories=[str(tmp_path), Share("/tmp", read_only=True)])
    running = client.wait_vm("web", "running", 20)
    assert [share.read_only for share in running.shared_directories] == [False, True]
    assert running.is_alive
    with pytest.raises(WrongState):
        client.update_vm("web", cpu=4)
    assert client.stop_vm("web", force=True).last_end is not None
    client.clone_vm("web", "web2")
    for name in ("web", "web2"):
        client.delete_vm(name)
    with pytest.raises(NotFound, match="Virtual machine not found: web"):
        client.get_vm("web")


def test_failures_are_the_errors_that_the_server_meant(client: Client) -> None:
    make(client, "twice")
    with pytest.raises(AlreadyExists) as exists:
        make(client, "twice")
    assert exists.value.code == "already_exists"
    with pytest.raises(InvalidField) as invalid:
        client.create_vm("x", cpu=0, memory="4XB")
    assert set(invalid.value.fields) == {"cpu", "memory"}
    with pytest.raises(NotFound):
        client.get_operation("op-none")
    client.delete_vm("twice")


def test_a_failed_operation_raises_what_it_failed_with(client: Client) -> None:
    # Nobody listens on port 1.
    vm = client.pull_vm("img:1", "gone", registry="127.0.0.1:1", organization="o")
    assert vm.operation is not None
    with pytest.raises(RegistryFailed):
        client.finish_operation(vm.operation, 60)
    with pytest.raises(PullFailed, match="Pull failed for 'gone'"):
        client.get_vm("gone")


def test_the_host_its_settings_and_its_images(client: Client, tmp_path: Path) -> None:
    assert client.host_status().cpu_count > 0
    client.change_config(default_image="tiny")
    assert client.get_config().default_image == "tiny"
    client.add_location("fast", str(tmp_path / "fast"))
    assert "fast" in [location.name for location in client.list_locations()]
    client.remove_location("fast")
    make(client, "user")
    (image,) = [image for image in client.list_images() if image.name == "tiny"]
    assert image.vms == ("user",)
    assert image.id in [kept.id for kept in client.prune_images(dry_run=True).kept]
    with pytest.raises(WrongState):
        client.delete_image("tiny")
    client.delete_vm("user")
    assert set(client.server_logs(lines=3)) == {"info", "error"}


def test_a_wait_that_cannot_end_well_says_so_at_its_deadline(client: Client) -> None:
    make(client, "silent")
    client.run_vm("silent")
    client.wait_vm("silent", "running", 20)
    with pytest.raises(TimedOut, match=r"not reachable within 0\.2 s: it is running"):
        client.wait_vm("silent", "ip", 0.2)
    client.delete_vm("silent")


async def test_the_same_verbs_can_be_awaited(url: str) -> None:
    async with AsyncClient(url) as client:
        vm = await client.create_vm("aweb", image="tiny", cpu=1, memory="256MB", disk_size="1GB")
        assert vm.operation is not None
        stages = [operation async for operation in client.follow_operation(vm.operation)]
        assert stages[-1].is_over
        await client.run_vm("aweb")
        assert (await client.wait_vm("aweb", "running", 20)).is_alive
        many = await asyncio.gather(*(client.get_vm("aweb") for _ in range(20)))
        assert {vm.name for vm in many} == {"aweb"}
        await client.delete_vm("aweb")
        with pytest.raises(NotFound):
            await client.get_vm("aweb")


def test_both_clients_have_the_same_methods_and_they_say_what_they_take() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert public(Client) == public(AsyncClient)
    client = Client("http://localhost:1")
    for name in public(Client):
        assert inspect.getdoc(getattr(client, name)), name
    assert "storage" in inspect.signature(client.get_vm).parameters


# Servers that fail


@contextmanager
def answering(answer: Callable[[socket.socket], object]) -> Iterator[str]:
    """The URL of a server that does that with its first connection, after the request came."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                answer(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(10)


def test_no_server_is_said_with_the_line_that_starts_one(tmp_path: Path) -> None:
    for client in (Client("http://127.0.0.1:1"), Client(home=tmp_path)):
        with client, pytest.raises(ServerUnreachable, match="No server answers on") as error:
            client.list_vms()
        assert error.value.hint == "start one: lume serve"


def test_a_server_that_goes_away_leaves_a_write_with_an_unknown_outcome() -> None:
    with (
        answering(lambda connection: None) as url,
        Client(url) as client,
        pytest.raises(OutcomeUnknown) as lost,
    ):
        client.stop_vm("x")
    assert lost.value.hint == "look before you repeat it"
    with (
        answering(lambda connection: None) as url,
        Client(url) as client,
        pytest.raises(ServerUnreachable, match="went away"),
    ):
        client.list_vms()


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n[{}, null",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n[{}]",
        b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 6\r\n\r\n<html>",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n[]",
    ],
)
def test_an_answer_that_makes_no_sense_is_an_error_and_no_traceback(reply: bytes) -> None:
    with (
        answering(lambda connection: connection.sendall(reply)) as url,
        Client(url) as client,
        pytest.raises(LumedError, match=r"cannot be understood|without a reason|went away"),
    ):
        client.list_vms()


def test_connections_are_kept_and_one_that_the_server_closed_is_made_anew() -> None:
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]"
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        listener.settimeout(10)
        is_closed = threading.Event()

        def serve() -> list[int]:
            counts = []
            for requests in (2, 1):
                connection, _ = listener.accept()
                with connection:
                    counts.append(0)
                    while counts[-1] < requests and connection.recv(65536):
                        counts[-1] += 1
                        connection.sendall(reply)
                is_closed.set()
            return counts

        served = pool.submit(serve)
        with Client(f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
            for _ in range(2):
                assert client.list_vms() == []
            assert is_closed.wait(10)
            assert client.list_vms() == []
            assert served.result(10) == [2, 1]


@pytest.mark.parametrize(
    ("call", "error"), [(calls.list_vms(), TimedOut), (calls.stop_vm("x"), OutcomeUnknown)]
)
def test_a_silent_server_is_told_by_what_was_asked(
    call: Call[Any], error: type[LumedError]
) -> None:
    with (
        # It waits until the client has hung up.
        answering(lambda connection: connection.recv(1)) as url,
        Client(url) as client,
        pytest.raises(error),
    ):
        client.carry_out(replace(call, timeout_s=0.2))


@pytest.mark.parametrize("piece_bytes", [1, 7, 1000])
def test_events_come_in_any_pieces_and_hold_any_text(piece_bytes: int) -> None:
    data = {"text": "a line\u2028separator, one\x85more: and data: too"}
    stream = b": watching\n\n" + b"".join(
        f"id: 7-{number}\nevent: reset\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
        for number in range(2)
    )
    reader = EventReader()
    pieces = [stream[at : at + piece_bytes] for at in range(0, len(stream), piece_bytes)]
    events = [event for piece in pieces for event in reader.feed(piece)]
    assert [(event.id, event.kind, event.raw) for event in events] == [
        ("7-0", "reset", data),
        ("7-1", "reset", data),
    ]


def test_several_threads_may_use_one_client(client: Client) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.host_status().version, range(64)))
    assert len(set(answers)) == 1


def test_a_url_without_http_is_refused() -> None:
    with pytest.raises(InvalidField, match="begins with neither"):
        Client("localhost:7777")


def test_importing_lumed_loads_no_web_framework_and_no_http_library() -> None:
    code = (
        "import sys, lumed; assert not {'fastapi', 'httpx2', 'pydantic'} & set(sys.modules);"
        "from lumed import Client; Client; print(sorted({'fastapi', 'httpx2', 'pydantic',"
        " 'uvicorn', 'rich', 'cyclopts'} & set(sys.modules)))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert ended.stdout == "[]\n"
