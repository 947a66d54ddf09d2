"""The host, its logs, its settings and the operations."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lumed.http.app import build_app
from lumed.log import EventLog, start_logging
from lumed.service.local import LocalEngine
from lumed.store.layout import Home
from tests.doubles.fake_driver import FakeDriver
from tests.http.conftest import Client, connect, start_fake_engine

SMALL = {"os": "linux", "cpu": 1, "memory": "64MB", "diskSize": "64MB"}
CONFIG = "/lume/config"
LOCATIONS = "/lume/config/locations"
OPERATIONS = "/lume/operations"


async def start_create(client: Client, name: str, **more: object) -> str:
    reply = await client.post("/lume/vms", json={"name": name, **SMALL, **more})
    assert reply.status_code == 202, reply.text
    return str(reply.json()["operation"])


async def wait_over(client: Client, operation: str) -> dict[str, object]:
    async with asyncio.timeout(10):
        while True:
            found: dict[str, object] = (await client.get(f"{OPERATIONS}/{operation}")).json()
            if found["status"] != "running":
                return found
            await asyncio.sleep(0.01)


async def named_locations(client: Client) -> dict[str, str]:
    reply = await client.get(LOCATIONS)
    assert reply.status_code == 200
    return {location["name"]: location["path"] for location in reply.json()}


# The host


async def test_the_host_is_told_in_integers(client: Client) -> None:
    host = (await client.get("/lume/host/status")).json()
    assert host["status"] == "healthy"
    assert isinstance(host["version"], str)
    whole = ("vm_count", "max_vms", "available_slots", "cpuCount", "memoryTotal", "diskFree")
    assert all(type(host[key]) is int for key in whole)
    assert host["vm_count"] == host["runningCount"] == 0
    assert host["max_vms"] == host["available_slots"] > 0
    assert host["memoryTotal"] >= host["memoryAvailable"] > 0
    assert (host["accelerator"], host["acceleratorReason"]) == ("tcg", "tests have no machine")


async def test_a_running_vm_takes_a_slot(client: Client) -> None:
    await wait_over(client, await start_create(client, "web", image="tiny"))
    reply = await client.post("/lume/vms/web/run", json={"network": "none"})
    await wait_over(client, reply.json()["operation"])
    host = (await client.get("/lume/host/status")).json()
    assert (host["vm_count"], host["runningCount"]) == (1, 1)
    assert host["available_slots"] == host["max_vms"] - 1


@pytest.fixture
def logs(home: Home) -> Iterator[None]:
    with start_logging(home.logs, "info"):
        yield


@pytest.mark.usefixtures("logs")
async def test_logs_are_chosen_by_type_and_cut_to_their_last_lines(client: Client) -> None:
    log = EventLog("test")
    for number in range(5):
        log.info("counted", number=number)
    log.warning("odd")
    both = (await client.get("/lume/logs")).json()
    assert set(both) == {"info", "error"}
    assert both == (await client.get("/lume/logs", params={"type": "all"})).json()
    assert both["info"].count("counted") == 5
    assert "WARNING: odd" in both["info"]
    assert "counted" not in both["error"]
    reply = await client.get("/lume/logs", params={"type": "info", "lines": 2})
    assert set(reply.json()) == {"info"}
    lines = reply.json()["info"].splitlines()
    assert [line.split(": ", 1)[1] for line in lines] == ["counted number=4", "odd"]
    error = (await client.get("/lume/logs", params={"type": "error", "lines": 9})).json()
    assert error["error"].splitlines() == [lines[1]]


async def test_logs_that_are_not_there_are_empty(client: Client) -> None:
    assert (await client.get("/lume/logs")).json() == {"info": "", "error": ""}


@pytest.mark.parametrize(
    ("key", "value"),
    [("type", "secret"), ("lines", "0"), ("lines", "-1"), ("lines", "many"), ("lines", "1e9")],
)
async def test_odd_wishes_for_logs_are_named(client: Client, key: str, value: str) -> None:
    reply = await client.get("/lume/logs", params={key: value})
    assert (reply.status_code, list(reply.json()["fields"])) == (422, [key])


# Settings


async def test_the_settings_have_lumes_keys(client: Client, home: Home) -> None:
    config = (await client.get(CONFIG)).json()
    assert config["defaultLocationName"] == "home"
    assert {"name": "home", "path": str(home.location("home"))} in config["vmLocations"]
    assert config["cacheDirectory"] == str(home.cache)
    assert config["cachingEnabled"] is True
    assert config["telemetryEnabled"] is False
    assert config["defaultImage"] == "debian:12"
    assert config["registry"]["ghcr"] == {"registry": "ghcr.io", "organization": "trycua"}


async def test_settings_change_and_survive_the_server(
    engine: LocalEngine, home: Home, tmp_path: Path
) -> None:
    async with connect(build_app(engine)) as client:
        changes = {
            "cacheDirectory": str(tmp_path / "cache"),
            "cachingEnabled": False,
            "defaultImage": "debian:13",
            "homeDirectory": str(tmp_path / "vms"),
        }
        reply = await client.post(CONFIG, json=changes)
        assert reply.json() == {"message": "Configuration updated successfully"}
        reply = await client.post(LOCATIONS, json={"name": "fast", "path": str(tmp_path / "f")})
        assert reply.status_code == 200
        assert (await client.post(f"{LOCATIONS}/default/fast")).status_code == 200
        await wait_over(client, await start_create(client, "web"))
        before = (await client.get(CONFIG)).json()
    assert before["cacheDirectory"] == str(tmp_path / "cache")
    assert before["cachingEnabled"] is False
    assert before["defaultLocationName"] == "fast"
    await engine.close()

    async with (
        start_fake_engine(home, FakeDriver()) as second,
        connect(build_app(second)) as client,
    ):
        assert (await client.get(CONFIG)).json() == before
        assert (await client.get("/lume/vms/web")).json()["locationName"] == "fast"
        assert (tmp_path / "f/web/config.json").exists()


@pytest.mark.parametrize("key", ["homeDirectory", "cacheDirectory"])
@pytest.mark.parametrize("value", ["relative", "/dev/null/x", "~nobody-here/x", "a\0b", "", 3])
async def test_a_directory_that_cannot_be_used_is_refused(
    client: Client, home: Home, key: str, value: object
) -> None:
    reply = await client.post(CONFIG, json={key: value})
    assert (reply.status_code, list(reply.json()["fields"])) == (422, [key]), reply.text
    assert not (home.root / "config.yaml").exists()


# Locations


async def test_the_documents_locations_are_there_from_the_start(client: Client) -> None:
    assert set(await named_locations(client)) == {"home", "ssd", "hdd", "nvme", "ephemeral"}


async def test_a_location_is_added_used_and_removed(client: Client, tmp_path: Path) -> None:
    path = str(tmp_path / "deep/fast")
    reply = await client.post(LOCATIONS, json={"name": "fast", "path": path})
    assert reply.status_code == 200
    assert reply.json() == {
        "message": "Location added successfully",
        "name": "fast",
        "path": path,
    }
    await wait_over(client, await start_create(client, "web", storage="fast"))
    assert (tmp_path / "deep/fast/web/config.json").exists()
    reply = await client.post(LOCATIONS, json={"name": "fast", "path": str(tmp_path / "x")})
    assert (reply.status_code, reply.json()["code"]) == (409, "already_exists")
    assert (await named_locations(client))["fast"] == path
    reply = await client.delete(f"{LOCATIONS}/fast")
    assert reply.json() == {"message": "Location removed successfully"}
    assert "fast" not in await named_locations(client)
    # No change of settings hides a VM: without a name, its location is the path.
    (vm,) = (await client.get("/lume/vms")).json()
    assert (vm["name"], vm["locationName"]) == ("web", path)
    await client.post(LOCATIONS, json={"name": "again", "path": path})
    (vm,) = (await client.get("/lume/vms")).json()
    assert (vm["name"], vm["locationName"]) == ("web", "again")


async def test_a_default_image_must_be_one_that_could_be(client: Client) -> None:
    reply = await client.post(CONFIG, json={"defaultImage": "vista"})
    assert (reply.status_code, list(reply.json()["fields"])) == (422, ["defaultImage"])
    assert (await client.get(CONFIG)).json()["defaultImage"] == "debian:12"


async def test_a_built_in_location_may_get_a_folder_of_its_own(
    client: Client, tmp_path: Path
) -> None:
    path = str(tmp_path / "disk")
    assert (await client.post(LOCATIONS, json={"name": "ssd", "path": path})).status_code == 200
    assert (await named_locations(client))["ssd"] == path
    reply = await client.post(LOCATIONS, json={"name": "ssd", "path": path})
    assert reply.status_code == 409
    assert (await client.delete(f"{LOCATIONS}/ssd")).status_code == 200
    assert (await named_locations(client))["ssd"] != path
    reply = await client.delete(f"{LOCATIONS}/ssd")
    assert (reply.status_code, "built in" in reply.json()["message"]) == (409, True)


async def test_the_default_location_is_chosen_and_then_stays(
    client: Client, tmp_path: Path
) -> None:
    await client.post(LOCATIONS, json={"name": "fast", "path": str(tmp_path / "fast")})
    reply = await client.post(f"{LOCATIONS}/default/fast")
    assert reply.json() == {"message": "Default location set successfully"}
    await wait_over(client, await start_create(client, "web"))
    assert (await client.get("/lume/vms/web")).json()["locationName"] == "fast"
    reply = await client.delete(f"{LOCATIONS}/fast")
    assert reply.status_code == 409
    assert reply.json()["message"] == (
        "Cannot remove the default location 'fast'. Set a new default location first."
    )
    await client.post(f"{LOCATIONS}/default/home")
    assert (await client.delete(f"{LOCATIONS}/fast")).status_code == 200


async def test_an_unknown_location_is_not_found(client: Client) -> None:
    for method, path in (("DELETE", "/nowhere"), ("POST", "/default/nowhere")):
        reply = await client.request(method, LOCATIONS + path)
        assert reply.status_code == 404
        assert reply.json()["message"] == "VM location not found: nowhere"


@pytest.mark.parametrize("name", ["", "a b", "a/b", "../x", "ä", "x" * 65, "a\n", None, 3])
async def test_a_location_has_a_plain_name(client: Client, tmp_path: Path, name: object) -> None:
    reply = await client.post(LOCATIONS, json={"name": name, "path": str(tmp_path / "new")})
    assert (reply.status_code, list(reply.json()["fields"])) == (422, ["name"])
    assert not (tmp_path / "new").exists()


async def test_a_location_is_a_writable_folder(client: Client, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (str(file), str(file / "below"), "relative/x", "~nobody-here/x", "/proc/x", ""):
        reply = await client.post(LOCATIONS, json={"name": "fast", "path": path})
        assert (reply.status_code, list(reply.json()["fields"])) == (422, ["path"]), path
        assert path in reply.json()["message"]
    assert "fast" not in await named_locations(client)


# Operations


async def test_operations_are_listed_newest_first_and_told_one_by_one(client: Client) -> None:
    first = await start_create(client, "a")
    await wait_over(client, first)
    second = await start_create(client, "b", image="tiny")
    over = await wait_over(client, second)
    assert over.keys() >= {"id", "action", "target", "status", "stage", "startedAt", "endedAt"}
    assert (over["action"], over["target"], over["status"]) == ("create", "b", "succeeded")
    assert str(over["startedAt"]) <= str(over["endedAt"])
    listed = (await client.get(OPERATIONS)).json()
    assert [operation["id"] for operation in listed] == [second, first]
    assert listed[0] == over


async def test_an_unknown_operation_is_not_found(client: Client) -> None:
    for method, path in (("GET", "/op-0"), ("POST", "/op-0/cancel"), ("GET", "/..%2f..%2fetc")):
        reply = await client.request(method, OPERATIONS + path)
        assert (reply.status_code, reply.json()["code"]) == (404, "not_found")


async def test_an_operation_that_is_over_cannot_be_cancelled(client: Client) -> None:
    operation = await start_create(client, "web")
    await wait_over(client, operation)
    reply = await client.post(f"{OPERATIONS}/{operation}/cancel")
    assert (reply.status_code, reply.json()["code"]) == (409, "wrong_state")
    assert "succeeded" in reply.json()["message"]


async def test_a_cancelled_create_leaves_nothing(client: Client, home: Home) -> None:
    operation = await start_create(client, "web", image="tiny")
    reply = await client.post(f"{OPERATIONS}/{operation}/cancel")
    assert (reply.status_code, reply.json()["status"]) == (200, "cancelled")
    assert (await client.get("/lume/vms")).json() == []
    left = [path.name for path in home.location("home").rglob("*")]
    assert set(left) <= {".staging"}
    await wait_over(client, await start_create(client, "web", image="tiny"))


async def test_operations_survive_the_server(engine: LocalEngine, home: Home) -> None:
    async with connect(build_app(engine)) as client:
        operation = await start_create(client, "web")
        over = await wait_over(client, operation)
    await engine.close()
    torn = home.operations / "op-0000000000000000.json"
    torn.write_text("{")
    running = home.operations / f"{operation}.json"
    begun = json.loads(running.read_text()) | {"id": "op-1", "status": "running"}
    (home.operations / "op-1.json").write_text(json.dumps(begun))
    async with (
        start_fake_engine(home, FakeDriver()) as second,
        connect(build_app(second)) as client,
    ):
        assert (await client.get(f"{OPERATIONS}/{operation}")).json() == over
        interrupted = (await client.get(f"{OPERATIONS}/op-1")).json()
        assert interrupted["status"] == "interrupted"
        assert interrupted["failure"]["code"] == "interrupted"
        assert len((await client.get(OPERATIONS)).json()) == 2
    assert torn.read_text() == "{"
