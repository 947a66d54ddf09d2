"""The published client, unchanged, with a real server, a real registry and real guests.

pylume 0.2.1 asks over curl, checks every answer by its own models, and waits for nothing: whoever
uses it polls.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lumed.images.local import ImageCache
from lumed.images.tiny import builtin_tiny
from tests.registry.images import store_lume_image
from tests.registry.world import RunningRegistry, running_registry
from tests.system.harness import BOOT_S, Server, get_line, running_server

with warnings.catch_warnings():
    # It was written for an older pydantic.
    warnings.simplefilter("ignore")
    import pylume

# It looks into /proc/1/cgroup for docker, and does not close it.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

GIB = 1 << 30
# Not trycua, its default: the cache of images is shared with other tests.
ORGANIZATION = "of-pylume"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, image_cache: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("pylume")
    (folder / "Projects").mkdir()
    env = {"HOME": str(folder), "DOCKER_CONFIG": str(folder / "no-docker")}
    arguments = ["--compat-port", "0"]
    with running_server(folder / "home", image_cache, env=env, arguments=arguments) as server:
        yield server


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, image_cache: Path) -> Iterator[str]:
    """The host of a registry that has tiny:1, the tiny guest in Lume's format."""
    cache = ImageCache(image_cache / "images", {"tiny": builtin_tiny()})
    image = asyncio.run(cache.get_builtin("tiny", lambda *_: None))
    found: RunningRegistry
    with running_registry(tmp_path_factory.mktemp("registry")) as found:
        store_lume_image(found, f"{ORGANIZATION}/tiny:1", image.disk)
        yield found.host


@pytest.fixture
async def client(server: Server) -> AsyncIterator[pylume.PyLume]:
    where = json.loads((server.home / "server.json").read_text())["compatUrl"]
    port = int(where.rpartition(":")[2])
    async with pylume.PyLume(port=port, use_existing_server=True, server_start_timeout=1) as client:
        yield client
        for vm in await client.list_vms():
            await client.delete_vm(vm.name)
        assert await client.list_vms() == []


def config(name: str, **more: object) -> pylume.VMConfig:
    """A VM that boots the configured default image, tiny: the client knows no `image`."""
    fields: dict[str, Any] = {"os": "linux", "cpu": 1, "memory": "256MB", "diskSize": "1GB"}
    return pylume.VMConfig(name=name, ipsw="latest", **{**fields, **more})


async def wait_for(
    client: pylume.PyLume, name: str, what: Callable[[pylume.VMStatus], object]
) -> pylume.VMStatus:
    """Poll, as its users do; every answer on the way passes its models, alone and in the list."""
    give_up_at = time.monotonic() + BOOT_S
    while True:
        vm = await client.get_vm(name)
        assert name in [other.name for other in await client.list_vms()]
        if what(vm):
            return vm
        assert time.monotonic() < give_up_at, vm


async def create(client: pylume.PyLume, name: str, **more: object) -> pylume.VMStatus:
    await client.create_vm(config(name, **more))
    return await wait_for(client, name, lambda vm: vm.status == "stopped")


async def test_a_guest_lives_from_create_to_delete(client: pylume.PyLume, server: Server) -> None:
    made = await create(client, "web")
    assert (made.os, made.cpu, made.memory_size) == ("linux", 1, 256 << 20)
    assert made.disk_size.total == GIB
    assert 0 < made.disk_size.allocated < GIB
    assert (made.ip_address, made.vnc_url) == (None, None)

    share = pylume.SharedDirectory(hostPath="~/Projects", read_only=True)
    await client.run_vm("web", pylume.VMRunOpts(no_display=True, shared_directories=[share]))

    def is_reached(vm: pylume.VMStatus) -> bool:
        assert vm.status != "stopped"
        return vm.ip_address is not None

    running = await wait_for(client, "web", is_reached)
    assert running.status == "running"
    assert re.fullmatch(r"vnc://:[^@/:]+@127\.0\.0\.1:\d+", running.vnc_url or "")
    assert running.ip_address is not None
    assert get_line(running.ip_address, 8000).startswith("lumed tiny web")
    (shared,) = server.vm("web")["sharedDirectories"]
    assert (shared["hostPath"], shared["readOnly"]) == (
        str(server.home.parent / "Projects"),
        True,
    )

    await client.stop_vm("web")
    stopped = await client.get_vm("web")
    assert (stopped.status, stopped.ip_address, stopped.vnc_url) == ("stopped", None, None)
    await client.delete_vm("web")
    with pytest.raises(pylume.LumeNotFoundError):
        await client.get_vm("web")


async def test_a_run_without_options_is_one_with_its_defaults(client: pylume.PyLume) -> None:
    await create(client, "web")
    await client.run_vm("web")
    await wait_for(client, "web", lambda vm: vm.status == "running")
    # A running VM is stopped by the delete.
    await client.delete_vm("web")


async def test_settings_change(client: pylume.PyLume) -> None:
    await create(client, "web")
    # On the wire it is disk_size: the model has no alias for it.
    await client.update_vm("web", pylume.VMUpdateOpts(cpu=2, memory="512MB", disk_size="2GB"))
    vm = await client.get_vm("web")
    assert (vm.cpu, vm.memory_size, vm.disk_size.total) == (2, 512 << 20, 2 * GIB)
    await client.update_vm("web", {"memory": "1.5GB"})
    vm = await client.get_vm("web")
    assert (vm.cpu, vm.memory_size, vm.disk_size.total) == (2, 3 * GIB // 2, 2 * GIB)


async def test_a_clone_is_another_vm(client: pylume.PyLume) -> None:
    source = await create(client, "web")
    # On the wire it is new_name: the model is dumped without its alias.
    await client.clone_vm("web", "web-2")
    clone = await client.get_vm("web-2")
    assert (clone.status, clone.disk_size.total) == ("stopped", source.disk_size.total)
    with pytest.raises(pylume.LumeError, match=r"409.*already exists"):
        await client.clone_vm("web", "web-2")


async def test_a_pull_is_over_when_it_returns(client: pylume.PyLume, registry: str) -> None:
    where = {"registry": registry, "organization": ORGANIZATION}
    await client.pull_image(pylume.ImageRef(image="tiny", tag="1", **where), name="pulled")
    pulled = await client.get_vm("pulled")
    assert (pulled.status, pulled.os, pulled.memory_size) == ("stopped", "linux", 256 << 20)
    # Without a name it sends null, which is none.
    await client.pull_image({"image": "tiny", "tag": "1", **where})
    assert (await client.get_vm("tiny")).status == "stopped"
    images = list(await client.get_images())
    assert images
    assert all(re.fullmatch(r"\S{12}", image.imageId) for image in images)
    assert len(list(await client.get_images(ORGANIZATION))) == 1
    assert len(list(await client.get_images("nobody"))) == 0


async def test_a_failed_pull_is_an_error_and_its_name_is_free(
    client: pylume.PyLume, registry: str
) -> None:
    gone = pylume.ImageRef(image="gone", registry=registry)
    with pytest.raises(pylume.LumeServerError, match="gone"):
        await client.pull_image(gone, name="web")
    await create(client, "web")


async def test_one_broken_vm_does_not_spoil_the_list(client: pylume.PyLume, server: Server) -> None:
    await create(client, "web")
    odd = server.vm_dir("odd")
    odd.mkdir()
    (odd / "config.json").write_text("{")
    (odd / "lumed.json").write_text("{")
    assert {vm.name: vm.status for vm in await client.list_vms()} == {
        "odd": "broken",
        "web": "stopped",
    }
    assert (await client.get_vm("odd")).disk_size.total == 0


async def test_failures_are_those_that_it_tells_apart(client: pylume.PyLume) -> None:
    for call in (client.get_vm, client.run_vm, client.stop_vm, client.delete_vm):
        with pytest.raises(pylume.LumeNotFoundError):
            await call("none")
    with pytest.raises(pylume.LumeServerError, match="Apple hardware"):
        await client.create_vm(pylume.VMConfig(name="mac", ipsw="latest"))
    with pytest.raises(pylume.LumeServerError, match="Apple hardware"):
        await client.get_latest_ipsw_url()
    with pytest.raises(pylume.LumeError, match=r"422.*diskSize"):
        await client.create_vm(config("web", diskSize="large"))
    await create(client, "web")
    with pytest.raises(pylume.LumeError, match=r"409.*already exists"):
        await client.create_vm(config("web"))


async def test_a_server_that_speaks_the_document_is_not_for_it(server: Server) -> None:
    """Why there is a second port: what it would say of the first one."""
    server.create("web")
    port = int(server.url.rpartition(":")[2])
    async with pylume.PyLume(port=port, use_existing_server=True) as client:
        with pytest.raises(ValueError, match="diskSize"):
            await client.list_vms()
    server.call("DELETE", "/vms/web", 200)
