from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lumed.store.layout import Home
from tests.doubles.fake_driver import FakeDriver
from tests.http.conftest import Client

SMALL = {"os": "linux", "cpu": 1, "memory": "64MB", "diskSize": "64MB"}
VMS = "/lume/vms"

# Contract, section 2: there in every state, or a typed client's whole list fails.
ALWAYS = {
    *("name", "state", "status", "os", "cpu", "cpuCount", "memory", "memorySize"),
    *("diskSize", "disk", "display", "locationName", "networkMode", "sharedDirectories"),
}


async def wait_for(client: Client, path: str, key: str, value: str) -> dict[str, Any]:
    async with asyncio.timeout(10):
        while True:
            found = (await client.get(path)).json()
            if found.get(key) == value:
                return dict(found)
            await asyncio.sleep(0.01)


async def wait_for_state(client: Client, name: str, state: str) -> dict[str, Any]:
    return await wait_for(client, f"{VMS}/{name}", "state", state)


async def create(client: Client, name: str, **more: object) -> dict[str, Any]:
    reply = await client.post(VMS, json={"name": name, **SMALL, **more})
    assert reply.status_code == 202, reply.text
    return await wait_for_state(client, name, "stopped")


async def run(client: Client, name: str, **options: object) -> dict[str, Any]:
    reply = await client.post(f"{VMS}/{name}/run", json={"network": "none", **options})
    assert reply.status_code == 202, reply.text
    return await wait_for_state(client, name, "running")


async def test_a_vm_lives_from_create_to_delete(client: Client) -> None:
    reply = await client.post(VMS, json={"name": "web", **SMALL, "image": "tiny"})
    assert reply.status_code == 202
    accepted = reply.json()
    assert accepted["status"] == accepted["state"] == "provisioning"
    assert accepted["message"] == "VM creation started"
    assert accepted.keys() >= ALWAYS
    stopped = await wait_for_state(client, "web", "stopped")
    assert stopped.keys() >= ALWAYS
    assert "ipAddress" not in stopped
    assert "vncUrl" not in stopped

    running = await run(client, "web")
    assert running["vncUrl"].startswith("vnc://:")
    assert running["vncUrl"].endswith("@127.0.0.1:5999")
    assert (await client.post(f"{VMS}/web/run")).status_code == 409

    reply = await client.post(f"{VMS}/web/stop")
    assert reply.status_code == 200
    assert reply.json()["state"] == "stopped"
    assert reply.json()["lastEnd"]["step"] == "power-button"

    reply = await client.delete(f"{VMS}/web")
    assert reply.status_code == 200
    assert "error" not in reply.json()
    reply = await client.get(f"{VMS}/web")
    assert reply.status_code == 404
    assert reply.json()["message"] == "Virtual machine not found: web"


async def test_the_document_keys_and_todays_keys_stand_side_by_side(client: Client) -> None:
    vm = await create(client, "web", cpu="2", memory="512MB", diskSize="1GB", display="800x600")
    assert (vm["cpu"], vm["cpuCount"]) == (2, 2)
    assert (vm["memory"], vm["memorySize"]) == ("512MB", 512 * 1024**2)
    assert (vm["diskSize"], vm["disk"]["total"]) == ("1GB", 1024**3)
    assert vm["display"] == "800x600"
    assert vm["os"] == "linux"


async def test_a_list_is_a_bare_array_sorted_by_name(client: Client) -> None:
    assert (await client.get(VMS)).json() == []
    for name in ("b", "a", "c"):
        await create(client, name)
    reply = await client.get(VMS)
    assert [vm["name"] for vm in reply.json()] == ["a", "b", "c"]
    assert (await client.get(VMS, params={"storage": "ssd"})).json() == []


@pytest.mark.parametrize("prefix", ["/lume/vms", "/vms", "/lume/vms/", "//lume//vms"])
async def test_every_spelling_of_a_path_works(client: Client, prefix: str) -> None:
    assert (await client.get(prefix, params={"x": "y"})).json() == []


async def test_a_name_can_be_used_once(client: Client) -> None:
    await create(client, "web")
    reply = await client.post(VMS, json={"name": "web", **SMALL, "storage": "hdd"})
    assert reply.status_code == 409
    assert reply.json()["code"] == "already_exists"


async def test_storage_names_a_folder_and_unknown_ones_are_listed(
    client: Client, home: Home
) -> None:
    vm = await create(client, "web", storage="ssd")
    assert vm["locationName"] == "ssd"
    assert (home.root / "storage/ssd/web/config.json").exists()
    assert (await client.get(f"{VMS}/web", params={"storage": "ssd"})).status_code == 200
    reply = await client.get(f"{VMS}/web", params={"storage": "hdd"})
    assert (reply.status_code, reply.json()["hint"]) == (404, "it is in storage ssd")
    reply = await client.get(f"{VMS}/web", params={"storage": "floppy"})
    assert reply.status_code == 422
    assert "ssd" in reply.json()["fields"]["storage"]


async def test_a_storage_path_is_remembered(client: Client, home: Home) -> None:
    place = home.root.parent / "elsewhere"
    vm = await create(client, "web", storage=str(place))
    assert vm["locationName"] == str(place)
    assert [vm["name"] for vm in (await client.get(VMS)).json()] == ["web"]


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
async def test_update_changes_a_stopped_vm(client: Client, method: str) -> None:
    await create(client, "web")
    reply = await client.request(
        method,
        f"{VMS}/web",
        json={"cpu": 4, "memory": "8GB", "disk_size": "100GB", "display": "1920x1080"},
    )
    assert reply.status_code == 200, reply.text
    vm = (await client.get(f"{VMS}/web")).json()
    assert (vm["cpu"], vm["memory"], vm["diskSize"]) == (4, "8GB", "100GB")
    assert vm["display"] == "1920x1080"
    reply = await client.post(f"{VMS}/web/update", json={"diskSize": "1GB"})
    assert reply.status_code == 422
    assert "shrink" in reply.json()["fields"]["diskSize"]


async def test_update_of_a_running_vm_is_a_conflict(client: Client) -> None:
    await create(client, "web")
    await run(client, "web")
    reply = await client.put(f"{VMS}/web", json={"cpu": 2})
    assert reply.status_code == 409
    assert "running" in reply.json()["message"]


async def test_a_run_of_an_empty_disk_says_so(client: Client) -> None:
    await create(client, "web")
    vm = await run(client, "web")
    assert "no installer" in vm["problems"][0]


async def test_shares_are_reported_with_their_tag(client: Client, home: Home) -> None:
    share = home.root.parent / "share"
    share.mkdir()
    await create(client, "web", image="tiny")
    vm = await run(client, "web", sharedDirectories=[{"hostPath": str(share), "readOnly": True}])
    assert vm["sharedDirectories"] == [
        {"hostPath": str(share), "readOnly": True, "tag": "com.apple.virtio-fs.automount"}
    ]


async def test_vnc_is_as_it_was_asked_for(client: Client) -> None:
    await create(client, "web", image="tiny")
    body = {"vncPassword": "my-secret", "network": "none"}
    await client.post(f"{VMS}/web/run", json=body)
    vm = await wait_for_state(client, "web", "running")
    assert vm["vncUrl"].startswith("vnc://:my-secret@")
    assert vm["problems"] == ["of the VNC password only the first 8 letters count"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"vncPort": 80}, "80 is below 5900"),
        ({"vncPort": 65536}, "65535"),
        ({"vncPort": True}, "true is no number"),
        ({"vncPassword": ""}, "1 to 64 letters"),
        ({"vncPassword": "a@b"}, "1 to 64 letters"),
        ({"disks": ["/nowhere"]}, "does not exist"),
        ({"disks": "/nowhere"}, "list"),
        ({"usbStorage": ["/dev/null"]}, "no regular file"),
        ({"usbStorage": ["x"] * 17}, "16"),
    ],
)
async def test_what_cannot_be_attached_is_told_by_its_field(
    client: Client, body: dict[str, object], words: str
) -> None:
    await create(client, "web", image="tiny")
    reply = await client.post(f"{VMS}/web/run", json=body)
    assert reply.status_code == 422
    assert words in reply.json()["message"]
    assert any(field.startswith(next(iter(body))) for field in reply.json()["fields"])


async def test_a_failed_start_is_told_by_the_vm_and_by_its_operation(
    client: Client, driver: FakeDriver
) -> None:
    await create(client, "web", image="tiny")
    driver.failure = "no such accelerator"
    reply = await client.post(f"{VMS}/web/run", json={"network": "none"})
    assert reply.status_code == 202
    vm = await wait_for_state(client, "web", "crashed")
    assert vm["lastEnd"]["cause"] == "failed-start"
    assert "no such accelerator" in vm["lastEnd"]["detail"]
    operation = (await client.get(f"/lume/operations/{reply.json()['operation']}")).json()
    assert operation["status"] == "failed"
    assert operation["failure"]["message"] == "no such accelerator"
    driver.failure = None
    await run(client, "web")


async def test_a_machine_that_is_killed_shows_as_crashed(
    client: Client, driver: FakeDriver
) -> None:
    await create(client, "web", image="tiny")
    await run(client, "web")
    driver.machines[-1].crash()
    vm = await wait_for_state(client, "web", "crashed")
    assert vm["lastEnd"]["detail"] == "QEMU was killed by signal 9"
    assert "vncUrl" not in vm


async def test_a_guest_that_shuts_down_is_stopped_not_crashed(
    client: Client, driver: FakeDriver
) -> None:
    await create(client, "web", image="tiny")
    await run(client, "web")
    await driver.machines[-1].press_power_button(1)
    vm = await wait_for_state(client, "web", "stopped")
    assert vm["lastEnd"]["cause"] == "guest-shutdown"


async def test_a_guest_whose_agent_ends_at_the_button_gets_the_time_to_shut_down(
    client: Client, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    await create(client, "web", image="tiny")
    await run(client, "web")
    over = asyncio.Event()
    driver.machines[-1].open_agent(over)
    monkeypatch.setattr("lumed.service.power._BUTTON_WITH_AGENT_S", 0.1)

    async def wait_longer() -> None:
        over.set()  # only now, after the time that a guest with a deaf agent gets

    monkeypatch.setattr("lumed.service.power._do_nothing", wait_longer)
    stopped = (await client.post(f"{VMS}/web/stop")).json()
    assert over.is_set()
    assert stopped["lastEnd"]["step"] == "power-button"


async def test_two_stops_are_one(client: Client, driver: FakeDriver) -> None:
    await create(client, "web", image="tiny")
    await run(client, "web")
    replies = await asyncio.gather(*(client.post(f"{VMS}/web/stop") for _ in range(2)))
    assert [reply.status_code for reply in replies] == [200, 200]
    reply = await client.post(f"{VMS}/web/stop")
    assert reply.status_code == 409
    assert reply.json()["message"] == "Virtual machine not running: web"


async def test_a_run_during_a_start_is_busy(client: Client, driver: FakeDriver) -> None:
    await create(client, "web", image="tiny")
    driver.delay = asyncio.Event()
    assert (await client.post(f"{VMS}/web/run", json={"network": "none"})).status_code == 202
    assert (await client.get(f"{VMS}/web")).json()["state"] == "starting"
    reply = await client.post(f"{VMS}/web/run")
    assert (reply.status_code, reply.json()["fields"]["action"]) == (409, "run")
    stopping = asyncio.create_task(client.post(f"{VMS}/web/stop"))
    await asyncio.sleep(0)
    driver.delay.set()
    assert (await stopping).json()["state"] == "stopped"


async def test_a_cancelled_start_leaves_no_machine(client: Client, driver: FakeDriver) -> None:
    await create(client, "web", image="tiny")
    driver.delay = asyncio.Event()
    reply = await client.post(f"{VMS}/web/run", json={"network": "none"})
    operation = reply.json()["operation"]
    await asyncio.wait_for(driver.launching.wait(), 10)
    reply = await client.post(f"/lume/operations/{operation}/cancel")
    assert reply.json()["status"] == "cancelled"
    vm = await wait_for_state(client, "web", "stopped")
    assert vm["lastEnd"]["detail"] == "its start was cancelled"
    assert (await client.post(f"/lume/operations/{operation}/cancel")).status_code == 409


async def test_a_running_vm_is_stopped_by_delete(client: Client, driver: FakeDriver) -> None:
    await create(client, "web", image="tiny")
    await run(client, "web")
    assert (await client.delete(f"{VMS}/web")).status_code == 200
    assert (await client.get(VMS)).json() == []
    assert not driver.machines[-1].is_alive


async def test_a_create_that_fails_frees_the_name_and_keeps_the_reason(
    client: Client, home: Home
) -> None:
    blocked = home.root / "cache"
    blocked.write_text("not a folder")
    reply = await client.post(VMS, json={"name": "web", **SMALL, "image": "tiny"})
    assert reply.status_code == 202
    operation = f"/lume/operations/{reply.json()['operation']}"
    failed = await wait_for(client, operation, "status", "failed")
    reply = await client.get(f"{VMS}/web")
    assert reply.status_code == 404
    assert failed["failure"]["message"] in reply.json()["hint"]
    blocked.unlink()
    await create(client, "web", image="tiny")


async def test_a_missing_tool_is_told_before_the_work_is_accepted(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    reply = await client.post(VMS, json={"name": "web", **SMALL})
    assert (reply.status_code, reply.json()["code"]) == (503, "missing_dependency")
    assert reply.json()["hint"] == "sudo apt-get install qemu-utils"
    assert (await client.get("/lume/operations")).json() == []


async def test_macos_guests_are_refused_with_their_reason(client: Client) -> None:
    reply = await client.post(VMS, json={"name": "mac", **SMALL, "os": "macOS", "ipsw": "latest"})
    assert reply.status_code == 501
    assert "Apple" in reply.json()["message"]
    assert (await client.get(VMS)).json() == []


async def test_what_only_apples_hosts_can_do_is_501_with_its_reason(client: Client) -> None:
    await create(client, "web")
    for reply in (await client.get("/lume/ipsw"), await client.post(f"{VMS}/web/setup", json={})):
        assert (reply.status_code, reply.json()["code"]) == (501, "not_possible_here")
        assert "Apple" in reply.json()["message"]
    assert (await client.post(f"{VMS}/none/setup", json={})).status_code == 404


async def test_ipsw_names_an_image_and_latest_is_the_default_one(client: Client) -> None:
    assert (await client.get("/lume/config")).json()["defaultImage"] == "debian:12"
    reply = await client.post("/lume/config", json={"defaultImage": "tiny"})
    assert reply.status_code == 200
    assert (await create(client, "a", ipsw="latest"))["image"] == "tiny"
    assert (await create(client, "b", ipsw="tiny"))["image"] == "tiny"
    reply = await client.post(VMS, json={"name": "c", **SMALL, "ipsw": "vista"})
    assert (reply.status_code, list(reply.json()["fields"])) == (422, ["ipsw"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "../x"),
        ("name", "a/b"),
        ("name", ""),
        ("name", "x" * 300),
        ("name", None),
        ("os", "plan9"),
        ("cpu", 0),
        ("cpu", "two"),
        ("cpu", 10000),
        ("cpu", True),
        ("ports", [True]),
        ("memory", "-1GB"),
        ("memory", "0"),
        ("memory", "4XB"),
        ("diskSize", "1e99GB"),
        ("diskSize", "100TB"),
        ("display", "0x0"),
        ("display", "axb"),
        ("image", "/does/not/exist.qcow2"),
        ("image", "relative/x.qcow2"),
        ("network", "carrier-pigeon"),
        ("storage", "floppy"),
        ("userData", "#cloud-config\n{"),
        ("sshKeys", ["nonsense"]),
        ("ports", [0]),
    ],
)
async def test_a_bad_field_is_named_and_nothing_is_made(
    client: Client, field: str, value: object
) -> None:
    reply = await client.post(VMS, json={"name": "web", **SMALL, field: value})
    assert reply.status_code == 422, reply.text
    body = reply.json()
    assert any(key.split(".")[0] == field for key in body["fields"])
    assert body["message"] == body["error"]
    assert (await client.get(VMS)).json() == []
    assert (await client.get("/lume/operations")).json() == []


@pytest.mark.parametrize("body", [b"{", b"[]", b"3", b'"x"', b"\xff", b"[" * 100_000])
async def test_a_body_that_is_no_object_is_400(client: Client, body: bytes) -> None:
    reply = await client.post(VMS, content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400, reply.text
    assert reply.json()["message"].startswith("Invalid request body: ")


async def test_a_body_without_a_content_type_is_json(client: Client) -> None:
    reply = await client.post(VMS, content=b'{"name": "web"}')
    assert reply.status_code == 422
    assert set(reply.json()["fields"]) == {"os", "cpu", "memory", "diskSize"}


@pytest.mark.parametrize("name", ["..%2fx", "a%2Fb", "x" * 300, ".staging", "%00", "a%0ab"])
async def test_names_in_paths_cannot_leave_their_route(client: Client, name: str) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/run"), ("POST", "/stop")):
        reply = await client.request(method, f"{VMS}/{name}{path}")
        assert reply.status_code == 404, (method, path, reply.text)
        assert reply.json()["message"].startswith("Virtual machine not found: ")


async def test_a_damaged_vm_shows_as_broken_and_nothing_is_deleted(
    client: Client, home: Home
) -> None:
    await create(client, "good", image="tiny")
    await create(client, "bad", image="tiny")
    config = home.location("home") / "bad/config.json"
    config.write_text("{ torn")
    listed = {vm["name"]: vm for vm in (await client.get(VMS)).json()}
    assert listed["bad"]["state"] == "broken"
    assert listed["bad"].keys() >= ALWAYS
    assert "cannot be read" in listed["bad"]["problems"][0]
    assert listed["good"]["state"] == "stopped"
    reply = await client.post(f"{VMS}/bad/run")
    assert (reply.status_code, reply.json()["code"]) == (409, "damaged")
    assert config.read_text() == "{ torn"
    assert (config.parent / "disk.qcow2").exists()


async def test_unknown_routes_and_methods_are_json_too(client: Client) -> None:
    reply = await client.get("/lume/nothing")
    assert (reply.status_code, reply.json()["code"]) == (404, "unknown_route")
    reply = await client.put("/lume/vms", json={})
    assert (reply.status_code, reply.json()["code"]) == (405, "wrong_method")
