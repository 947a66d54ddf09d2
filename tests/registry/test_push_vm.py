"""From a VM to a registry and back, through a real server."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.registry.faults import FaultProxy
from tests.registry.world import OCI_MANIFEST, RunningRegistry
from tests.system.harness import Server, running_server

_TAGS = ["1", "latest"]


@pytest.fixture
def server(tmp_path: Path, image_cache: Path) -> Iterator[Server]:
    """A server on a home of its own."""
    with running_server(tmp_path / "home", image_cache) as server:
        yield server


def push(server: Server, host: str, status: int = 202, **more: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"name": "web", "imageName": "web", "tags": _TAGS, "registry": host}
    body |= {"organization": "push", "chunkSizeMb": 8}
    return dict(server.call("POST", "/vms/push", status, json=body | more))


def skopeo(*arguments: str) -> Any:
    done = subprocess.run(
        ["skopeo", *arguments, "--tls-verify=false"], check=True, capture_output=True
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("form", ["lume", "containerDisk"])
def test_what_was_pushed_pulls_back_byte_for_byte_and_boots(
    server: Server, registry: RunningRegistry, tmp_path: Path, form: str
) -> None:
    server.create("web", diskSize="128MB")
    server.boot("web")
    server.shell("web", "echo kept > /root/mark; sync")
    server.call("POST", "/vms/web/stop", 200)
    reply = push(server, registry.host, format=form)
    assert (reply["name"], reply["imageName"], reply["tags"]) == ("web", "web", _TAGS)
    operation = server.wait_operation(reply["operation"])
    assert operation["status"] == "succeeded", operation
    assert operation["bytesDone"] == operation["bytesTotal"] > 0
    for tag in _TAGS:
        name = f"docker://{registry.host}/push/web:{tag}"
        assert skopeo("inspect", "--raw", name)["schemaVersion"] == 2
        _, headers, _ = registry.request(
            "HEAD", f"/v2/push/web/manifests/{tag}", headers={"Accept": OCI_MANIFEST}
        )
        assert headers["Docker-Content-Digest"] == operation["result"]
    if form == "containerDisk":
        assert skopeo("inspect", name)["Architecture"] == "amd64"
    body = {"image": f"web@{operation['result']}", "registry": registry.host}
    body |= {"organization": "push", "name": "back"}
    server.call("POST", "/pull", 200, json=body)
    assert server.read_disk("back", tmp_path) == server.read_disk("web", tmp_path)
    if form == "lume":
        seen = server.vm("back")
        assert (seen["cpu"], seen["memory"]) == (1, "256MB")
    server.boot("back")


def test_a_vm_is_held_while_it_is_pushed_and_a_killed_push_goes_on(
    server: Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    server.create("web", diskSize="128MB")
    go_on = threading.Event()
    proxy.hold("/manifests/", go_on)
    push(server, proxy.host, organization="held")
    assert proxy.noticed.wait(30)
    assert server.call("POST", "/vms/web/run", 409, json={})["fields"]["action"] == "push"
    assert server.vm("web")["operation"]
    assert proxy.uploaded > 0
    server.kill()
    go_on.set()
    proxy.clear()
    server.start()
    before = proxy.uploaded
    again = push(server, proxy.host, organization="held")
    assert server.wait_operation(again["operation"])["status"] == "succeeded"
    # The manifests, and no blob.
    assert proxy.uploaded - before < 64 << 10
    assert not any((server.home / "cache").rglob("owner.lock"))


def test_what_cannot_be_pushed_is_refused_at_once(server: Server) -> None:
    assert push(server, "127.0.0.1:1", 404)["code"] == "not_found"
    server.create("web")
    for change, field in (
        ({"imageName": "UPPER"}, "imageName"),
        ({"imageName": "web:1"}, "imageName"),
        ({"tags": []}, "tags"),
        ({"tags": ["a b"]}, "imageName"),
        ({"registry": "http://x"}, "registry"),
        ({"format": "ova"}, "format"),
        ({"chunkSizeMb": 0}, "chunkSizeMb"),
        ({"username": "me"}, "password"),
    ):
        assert field in push(server, "127.0.0.1:1", 422, **change)["fields"], change
    server.run("web", network="none")
    assert push(server, "127.0.0.1:1", 409)["code"] == "wrong_state"
    server.call("POST", "/vms/web/stop?force=true", 200)
    failed = server.wait_operation(push(server, "127.0.0.1:1")["operation"])
    assert failed["failure"]["code"] == "registry_failed"
    assert server.vm("web")["state"] == "stopped"
