"""POST /lume/vms/clone: what it answers, and what it waits for."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path

import pytest

from lumed.service import cloning
from lumed.store.layout import Home
from lumed.units import MIB
from tests.doubles.fake_driver import FakeDriver
from tests.http.conftest import Client
from tests.http.test_vms import ALWAYS, VMS, create, run, wait_for_state

CLONE = f"{VMS}/clone"


def write(disk: Path, mib: int) -> None:
    """Let a disk hold some data."""
    command = ["qemu-io", "-f", "qcow2", "-c", f"write -P 7 0 {mib}M", str(disk)]
    subprocess.run(command, check=True, capture_output=True)


async def test_a_clone_is_a_vm_like_its_source_with_an_identity_of_its_own(client: Client) -> None:
    source = await create(client, "web", image="tiny", cpu=3, display="800x600", network="none")
    reply = await client.post(CLONE, json={"name": "web", "newName": "web-2"})
    assert reply.status_code == 200, reply.text
    body = reply.json()
    assert body["message"] == "VM cloned successfully"
    assert (body["source"], body["destination"]) == ("web", "web-2")
    assert body.keys() >= ALWAYS
    assert "error" not in body
    assert (body["name"], body["state"]) == ("web-2", "stopped")
    same = ("cpu", "memory", "diskSize", "display", "networkMode", "image", "firmware")
    assert {key: body[key] for key in same} == {key: source[key] for key in same}
    assert body["uuid"] != source["uuid"]
    assert body["macAddress"] != source["macAddress"]
    assert [vm["name"] for vm in (await client.get(VMS)).json()] == ["web", "web-2"]
    (operation,) = (
        one for one in (await client.get("/lume/operations")).json() if one["action"] == "clone"
    )
    assert (operation["target"], operation["status"]) == ("web-2", "succeeded")


@pytest.mark.parametrize("first", ["web", "web-2"])
async def test_source_and_clone_are_deleted_in_any_order(client: Client, first: str) -> None:
    await create(client, "web")
    await client.post(CLONE, json={"name": "web", "new_name": "web-2"})
    assert (await client.delete(f"{VMS}/{first}")).status_code == 200
    (other,) = {"web", "web-2"} - {first}
    await run(client, other)
    assert (await client.post(f"{VMS}/{other}/stop")).status_code == 200
    assert (await client.delete(f"{VMS}/{other}")).status_code == 200


async def test_locations_of_both_can_be_named(client: Client, home: Home) -> None:
    await create(client, "web", storage="ssd")
    names = {"name": "web", "newName": "web-2"}
    wrong = await client.post(CLONE, json={**names, "sourceLocation": "hdd"})
    assert (wrong.status_code, wrong.json()["hint"]) == (404, "it is in storage ssd")
    place = home.root.parent / "elsewhere"
    reply = await client.post(
        CLONE, json={**names, "sourceLocation": "ssd", "destLocation": str(place)}
    )
    assert reply.json()["locationName"] == str(place)
    assert (place / "web-2/disk.qcow2").exists()
    # Without a destination it is the default location, wherever the source is.
    reply = await client.post(CLONE, json={"name": "web", "newName": "web-3"})
    assert reply.json()["locationName"] == "home"
    wrong = await client.post(
        CLONE, json={"name": "web", "newName": "web-4", "destLocation": "floppy"}
    )
    assert wrong.status_code == 422


async def test_a_running_vm_is_not_cloned(client: Client) -> None:
    await create(client, "web")
    await run(client, "web")
    reply = await client.post(CLONE, json={"name": "web", "newName": "web-2"})
    assert (reply.status_code, reply.json()["code"]) == (409, "wrong_state")
    assert reply.json()["message"] == "Virtual machine web is running; it must be stopped"
    assert (await client.get(f"{VMS}/web-2")).status_code == 404


async def test_a_vm_that_is_starting_is_not_cloned(client: Client, driver: FakeDriver) -> None:
    await create(client, "web")
    driver.delay = asyncio.Event()
    await client.post(f"{VMS}/web/run", json={"network": "none"})
    reply = await client.post(CLONE, json={"name": "web", "newName": "web-2"})
    assert reply.status_code == 409
    driver.delay.set()
    await wait_for_state(client, "web", "running")


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"name": "web"}, 422, "newName"),
        ({"newName": "web-2"}, 422, "name"),
        ({"name": "web", "newName": "../x"}, 422, "newName"),
        ({"name": "web", "newName": None}, 422, "newName"),
        ({"name": "none", "newName": "web-2"}, 404, None),
        ({"name": "web", "newName": "web"}, 409, None),
        ({"name": "web", "newName": "other"}, 409, None),
    ],
)
async def test_what_cannot_be_cloned_is_refused(
    client: Client, body: dict[str, object], status: int, field: str | None
) -> None:
    await create(client, "web")
    await create(client, "other", storage="hdd")
    reply = await client.post(CLONE, json=body)
    assert reply.status_code == status, reply.text
    if field is not None:
        assert field in reply.json()["fields"]
    assert len((await client.get(VMS)).json()) == 2


async def test_clones_of_one_source_wait_for_each_other(client: Client, home: Home) -> None:
    await create(client, "web")
    await asyncio.to_thread(write, home.location("home") / "web/disk.qcow2", 6)
    replies = await asyncio.gather(
        *(client.post(CLONE, json={"name": "web", "newName": f"web-{n}"}) for n in range(5)),
        client.put(f"{VMS}/web", json={"cpu": 2}),
    )
    assert [reply.status_code for reply in replies[:5]] == [200] * 5
    assert len((await client.get(VMS)).json()) == 6
    layers = await asyncio.to_thread(lambda: list(home.root.glob("vms/*/layer-*")))
    assert len(layers) == 6
    assert len({layer.name for layer in layers}) == 1


async def test_a_source_is_busy_and_the_clone_is_there_while_it_is_made(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    await create(client, "web")
    begun, go = asyncio.Event(), asyncio.Event()
    make_clone = cloning.make_clone

    async def held(*arguments: object) -> None:
        begun.set()
        await go.wait()
        await make_clone(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("lumed.service.local.make_clone", held)
    cloned = asyncio.create_task(client.post(CLONE, json={"name": "web", "newName": "web-2"}))
    await begun.wait()
    for method, path in (("POST", "run"), ("PUT", ""), ("DELETE", "")):
        reply = await client.request(method, f"{VMS}/web/{path}".rstrip("/"), json={})
        assert (reply.status_code, reply.json()["fields"]["action"]) == (409, "clone")
    shown = (await client.get(f"{VMS}/web-2")).json()
    assert shown["state"] == "provisioning"
    assert shown.keys() >= ALWAYS
    assert (await client.post(f"{VMS}/web-2/run")).status_code == 409
    go.set()
    assert (await cloned).status_code == 200
    assert (await client.get(f"{VMS}/web-2")).json()["state"] == "stopped"


async def test_a_clone_that_is_cancelled_leaves_nothing(
    client: Client, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    await create(client, "web")
    begun = asyncio.Event()

    async def held(*arguments: object) -> None:
        begun.set()
        await asyncio.Event().wait()

    monkeypatch.setattr("lumed.service.local.make_clone", held)
    cloned = asyncio.create_task(client.post(CLONE, json={"name": "web", "newName": "web-2"}))
    await begun.wait()
    assert (await client.delete(f"{VMS}/web-2")).status_code == 200
    assert (await cloned).status_code == 409
    assert [vm["name"] for vm in (await client.get(VMS)).json()] == ["web"]
    await run(client, "web")


async def test_what_a_disk_takes_counts_its_layers(client: Client, home: Home) -> None:
    await create(client, "web")
    await asyncio.to_thread(write, home.location("home") / "web/disk.qcow2", 8)
    before = (await client.get(f"{VMS}/web")).json()["disk"]
    assert before["allocated"] > 8 * MIB
    clone = (await client.post(CLONE, json={"name": "web", "newName": "web-2"})).json()
    for vm in (clone, (await client.get(f"{VMS}/web")).json()):
        assert vm["disk"]["total"] == before["total"]
        assert before["allocated"] <= vm["disk"]["allocated"] < before["allocated"] + MIB
    # Nor is a disk called empty whose system is in a layer.
    await run(client, "web-2")
    assert "problems" not in (await client.get(f"{VMS}/web-2")).json()


async def test_a_vm_that_lost_its_disk_is_not_cloned(client: Client, home: Home) -> None:
    await create(client, "web")
    await asyncio.to_thread((home.location("home") / "web/disk.qcow2").unlink)
    reply = await client.post(CLONE, json={"name": "web", "newName": "web-2"})
    assert (reply.status_code, reply.json()["code"]) == (409, "damaged")
    assert "No such file" in reply.json()["message"]
    assert not await asyncio.to_thread((home.location("home") / "web-2").exists)
    await asyncio.to_thread(shutil.rmtree, home.location("home") / "web")
