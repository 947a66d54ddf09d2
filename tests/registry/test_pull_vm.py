"""VMs from a registry: a real server pulls from a real registry, and what it made boots."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lumed.images.local import ImageCache
from lumed.images.tiny import builtin_tiny
from lumed.model.vm import DiskFormat
from tests.registry.faults import FaultProxy
from tests.registry.images import store_lume_image
from tests.registry.world import PASSWORD, USER, RunningRegistry
from tests.system.harness import Server, running_server

ALWAYS = {
    *("name", "state", "status", "os", "cpu", "cpuCount", "memory", "memorySize"),
    *("diskSize", "disk", "display", "locationName", "networkMode", "sharedDirectories"),
}
CHUNK = 1 << 20


@pytest.fixture(scope="module")
def disk(image_cache: Path) -> Path:
    """The tiny guest's disk, raw."""
    cache = ImageCache(image_cache / "images", {"tiny": builtin_tiny()})
    image = asyncio.run(cache.get_builtin("tiny", lambda *_: None))
    assert image.facts.format is DiskFormat.RAW
    return image.disk


@pytest.fixture(scope="module")
def slices(registry: RunningRegistry, disk: Path) -> list[str]:
    """The image org/sub/tiny:1 in the plain registry; its slices' digests."""
    return store_lume_image(registry, "org/sub/tiny:1", disk)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server with a cache of its own."""
    with running_server(tmp_path / "home", tmp_path / "home" / "cache") as server:
        yield server


def body(host: str, image: str = "tiny:1", **more: object) -> dict[str, Any]:
    return {"image": image, "registry": host, "organization": "org/sub", **more}


def start(server: Server, host: str, status: int = 202, **more: Any) -> dict[str, Any]:
    return dict(server.call("POST", "/images/pull", status, json=body(host, **more)))


def wait_fetched(server: Server, registry: RunningRegistry, digests: set[str]) -> dict[str, int]:
    """Wait until the server has written these blobs as a whole; their sizes.

    What a proxy has sent may still be on its way: megabytes of it on a busy machine.
    """
    sizes: dict[str, int] = {}
    give_up_at = time.monotonic() + 30
    for digest in digests:
        _, headers, _ = registry.request("HEAD", f"/v2/org/sub/tiny/blobs/{digest}")
        sizes[digest] = int(headers["Content-Length"])
        file = server.home / "cache" / "blobs" / "sha256" / digest.removeprefix("sha256:")
        while not file.exists() or file.stat().st_size < sizes[digest]:
            assert time.monotonic() < give_up_at
            time.sleep(0.02)
    return sizes


def test_a_pulled_vm_is_seen_from_acceptance_on_and_boots(
    server: Server, proxy: FaultProxy, slices: list[str]
) -> None:
    go_on = threading.Event()
    proxy.hold("/blobs/" + slices[1], go_on)
    accepted = start(server, proxy.host)
    assert accepted.keys() >= ALWAYS
    assert (accepted["name"], accepted["state"]) == ("tiny", "pulling")
    assert proxy.noticed.wait(20)
    [seen] = server.call("GET", "/vms", 200)
    assert seen.keys() >= ALWAYS
    assert seen["state"] == seen["status"] == "pulling"
    assert seen["image"] == f"{proxy.host}/org/sub/tiny:1"
    assert (seen["cpu"], seen["display"]) == (1, "800x600")
    assert 0 <= server.vm("tiny")["downloadProgress"] < 100
    assert server.call("POST", "/vms/tiny/run", 409, json={})["code"] == "busy"
    assert start(server, proxy.host, 409)["code"] == "already_exists"
    go_on.set()
    vm = server.wait_for("tiny", lambda vm: vm["state"] == "stopped", 30)
    assert (vm["cpu"], vm["memory"], vm["display"]) == (1, "256MB", "800x600")
    assert "downloadProgress" not in vm
    server.boot("tiny")
    server.call("POST", "/vms/tiny/stop", 200)


def test_the_waiting_pull_answers_when_the_vm_is_there_and_fetches_no_byte_twice(
    server: Server, proxy: FaultProxy, slices: list[str]
) -> None:
    reply = server.call("POST", "/pull", 200, json=body(proxy.host, name="one"))
    assert (reply["name"], reply["image"]) == ("one", "tiny:1")
    assert "error" not in reply
    first = Counter(proxy.served)
    assert set(slices) <= set(first)
    server.call("POST", "/pull", 200, json=body(proxy.host, name="two"))
    assert {digest: proxy.served[digest] for digest in slices} == {
        digest: first[digest] for digest in slices
    }
    assert {vm["state"] for vm in server.call("GET", "/vms", 200)} == {"stopped"}
    [image] = [i for i in server.call("GET", "/images", 200) if i["name"] != "tiny"]
    assert image["repository"] == "org/sub/tiny"
    assert image["vms"] == ["one", "two"]
    assert image["platform"] == {"os": "linux", "architecture": "amd64"}
    assert server.call("GET", "/images?organization=other", 200) == []
    # What was fetched is unpacked; the packed blobs are not kept beside it.
    assert list((server.home / "cache" / "blobs").rglob("*")) in ([], [_sha256(server)])


def _sha256(server: Server) -> Path:
    return server.home / "cache" / "blobs" / "sha256"


def test_a_failed_pull_is_told_until_its_name_is_deleted(
    server: Server, registry: RunningRegistry, slices: list[str]
) -> None:
    accepted = start(server, registry.host, image="none:1", name="web")
    assert server.wait_operation(accepted["operation"])["status"] == "failed"
    failed = server.call("GET", "/vms/web", 400)
    assert failed["message"].startswith("Pull failed for 'web': Image not found")
    assert server.call("GET", "/vms", 200) == []
    server.kill()
    server.start()
    assert server.call("GET", "/vms/web", 400)["code"] == "pull_failed"
    assert "error" not in server.call("DELETE", "/vms/web", 200)
    server.call("GET", "/vms/web", 404)
    server.kill()
    server.start()
    server.call("GET", "/vms/web", 404)
    assert server.call("POST", "/pull", 502, json=body(registry.host, "none:1", name="web"))
    server.call("POST", "/pull", 200, json=body(registry.host, name="web"))
    assert server.vm("web")["state"] == "stopped"


def test_a_cancelled_pull_frees_the_name_and_goes_on_where_it_was(
    server: Server, proxy: FaultProxy, registry: RunningRegistry, slices: list[str]
) -> None:
    go_on = threading.Event()
    proxy.hold("/blobs/" + slices[-1], go_on)
    start(server, proxy.host)
    assert proxy.noticed.wait(20)
    wait_fetched(server, registry, {slices[0]})
    assert server.call("POST", "/pull/cancel", 200, json={"name": "tiny"})["name"] == "tiny"
    server.call("GET", "/vms/tiny", 404)
    assert server.call("POST", "/pull/cancel", 404, json={"name": "tiny"})["code"] == "not_found"
    go_on.set()
    before = sum(proxy.served[digest] for digest in slices[:1])
    server.call("POST", "/pull", 200, json=body(proxy.host))
    assert sum(proxy.served[digest] for digest in slices[:1]) <= before + CHUNK


def test_a_pull_that_a_killed_server_left_goes_on_where_it_was(
    server: Server, proxy: FaultProxy, registry: RunningRegistry, slices: list[str]
) -> None:
    go_on = threading.Event()
    proxy.hold("/blobs/" + slices[-1], go_on)
    start(server, proxy.host)
    assert proxy.noticed.wait(20)
    sizes = wait_fetched(server, registry, {*slices} - {slices[-1]})
    server.kill()
    go_on.set()
    server.start()
    failed = server.call("GET", "/vms/tiny", 400)
    assert failed["message"].startswith("Pull failed for 'tiny': The server ended")
    assert list((server.home / "vms").glob("*")) == []
    assert not any((server.home / "vms" / ".staging").glob("*"))
    server.call("POST", "/pull", 200, json=body(proxy.host))
    assert sizes
    for digest, size in sizes.items():
        assert proxy.served[digest] <= size + CHUNK
    server.boot("tiny")


def test_a_login_is_used_and_kept_nowhere(
    server: Server, login_registry: RunningRegistry, disk: Path
) -> None:
    store_lume_image(login_registry, "org/sub/tiny:1", disk)
    host = login_registry.host
    refused = server.call("POST", "/pull", 502, json=body(host))
    assert "login" in (refused["message"] + refused.get("hint", ""))
    wrong = body(host, username=USER, password="not this")
    server.call("POST", "/pull", 502, json=wrong)
    half = server.call("POST", "/pull", 422, json=body(host, username=USER))
    assert "password" in half["fields"]
    right = body(host, username=USER, password=PASSWORD)
    server.call("POST", "/pull", 200, json=right)
    server.stop()
    secret = PASSWORD.encode()
    for file in server.home.rglob("*"):
        if file.is_file() and file.suffix != ".raw":
            assert secret not in file.read_bytes(), file
            assert b"not this" not in file.read_bytes(), file


def test_create_takes_the_reference_of_an_image(
    server: Server, registry: RunningRegistry, slices: list[str]
) -> None:
    name = f"{registry.host}/org/sub/tiny:1"
    vm = server.create("web", image=name)
    assert vm["image"] == name
    assert vm["disk"]["total"] == 1 << 30
    server.create("second", ipsw=name, image=None)
    missing = f"{registry.host}/org/sub/none:1"
    accepted = server.call(
        "POST",
        "/vms",
        202,
        json={
            "name": "third",
            "os": "linux",
            "cpu": 1,
            "memory": "256MB",
            "diskSize": "1GB",
            "image": missing,
        },
    )
    assert "Image not found" in server.wait_operation(accepted["operation"])["failure"]["message"]
    assert "Image not found" in server.call("GET", "/vms/third", 404)["hint"]


def test_a_pruned_cache_keeps_what_vms_rest_on(
    server: Server, registry: RunningRegistry, slices: list[str]
) -> None:
    server.call("POST", "/pull", 200, json=body(registry.host))
    name = f"{registry.host}/org/sub/tiny:1"
    assert server.call("DELETE", f"/images/{name}", 409)["fields"]["vms"] == ["tiny"]
    kept = server.call("POST", "/prune", 200)
    assert [image["name"] for image in kept["kept"]] == [name]
    assert kept["removed"] == []
    server.call("DELETE", "/vms/tiny", 200)
    would = server.call("POST", "/prune", 200, json={"dryRun": True})
    assert [image["name"] for image in would["removed"]] == [name]
    assert would["freed"] > 0
    assert len(server.call("GET", "/images", 200)) == 1
    removed = server.call("DELETE", f"/images/{name}", 200)
    assert removed["name"] == name
    assert server.call("GET", "/images", 200) == []
    server.call("DELETE", f"/images/{name}", 404)
    assert server.call("POST", "/prune", 200)["freed"] == 0


def test_a_macos_image_comes_into_the_cache_and_makes_no_vm(
    server: Server, registry: RunningRegistry, disk: Path
) -> None:
    store_lume_image(registry, "org/sub/mac:1", disk, os="macOS")
    reply = server.call("POST", "/pull", 501, json=body(registry.host, "mac:1"))
    assert "Apple" in reply["message"]
    [image] = server.call("GET", "/images", 200)
    assert image["platform"]["os"] == "macOS"
    assert server.call("GET", "/vms/mac", 400)["message"].startswith("Pull failed for 'mac'")


def test_a_bad_field_is_named(server: Server) -> None:
    for change, field in (
        ({"image": "UPPER"}, "image"),
        ({"image": None}, "image"),
        ({"registry": "http://x"}, "registry"),
        ({"organization": "../x"}, "organization"),
        ({"name": "../x"}, "name"),
        ({"storage": "floppy"}, "storage"),
    ):
        for route in ("/images/pull", "/pull", "/pull/start"):
            reply = server.call("POST", route, 422, json=body("127.0.0.1:1") | change)
            assert field in reply["fields"], (change, reply)
