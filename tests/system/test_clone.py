"""Clones of real guests."""

from __future__ import annotations

import contextlib
import random
import subprocess
import threading
import time

import httpx2 as httpx

from tests.system.harness import NO_TLS, Server


def test_a_clone_and_its_source_run_at_once_each_with_a_disk_of_its_own(server: Server) -> None:
    server.create("web")
    server.boot("web")
    # More than what would simply be copied.
    server.shell("web", "dd if=/dev/urandom of=/disk/big bs=1M count=8 2>/dev/null; sync")
    server.shell("web", "echo common > /disk/note; sync")
    sum_before = server.shell("web", "md5sum < /disk/big")
    refused = server.call("POST", "/vms/clone", 409, json={"name": "web", "newName": "copy"})
    assert refused["code"] == "wrong_state"
    source = server.call("POST", "/vms/web/stop", 200)

    clone = server.call("POST", "/vms/clone", 200, json={"name": "web", "newName": "copy"})
    assert clone["macAddress"] != source["macAddress"]
    (layer,) = server.vm_dir("copy").glob("layer-*.qcow2")
    assert layer.samefile(server.vm_dir("web") / layer.name)

    for name in ("web", "copy"):
        server.run(name)
    for name in ("web", "copy"):
        server.wait_for(name, lambda vm: "ipAddress" in vm)
        assert server.shell(name, "md5sum < /disk/big") == sum_before
        assert server.shell(name, "cat /disk/note") == "common"
        server.shell(name, f"echo {name} > /disk/note; sync")
    assert server.shell("copy", "hostname") == "copy"
    # The machine is found again, and so is its disk.
    server.kill()
    server.start()
    assert server.vm("copy")["state"] == "running"

    server.call("DELETE", "/vms/web", 200)
    server.call("POST", "/vms/copy/stop", 200)
    server.call("PUT", "/vms/copy", 200, json={"diskSize": "2GB"})
    server.run("copy", recoveryMode=True)
    server.wait_serial("copy", "lumed rescue")
    assert int(server.shell("copy", "cat /sys/block/vda/size")) * 512 == 2 * 1024**3
    server.shell("copy", "mkdir -p /disk; mount -t vfat /dev/vda1 /disk")
    assert server.shell("copy", "cat /disk/note") == "copy"
    assert server.shell("copy", "md5sum < /disk/big") == sum_before


def test_a_server_killed_in_the_middle_of_clones_loses_neither_data_nor_names(
    server: Server,
) -> None:
    chance = random.Random()  # noqa: S311
    server.create("web")
    disk = server.vm_dir("web") / "disk.qcow2"
    for hit in range(1, 13):
        write = f"write -P {hit} 512M 6M"
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", write, disk], check=True, timeout=30)

        def send() -> None:
            url = f"{server.url}/lume/vms/clone"
            with contextlib.suppress(httpx.HTTPError):
                body = {"name": "web", "newName": "copy"}
                httpx.post(url, json=body, timeout=20, verify=NO_TLS)

        sender = threading.Thread(target=send)
        sender.start()
        time.sleep(chance.random() * 0.1)
        server.kill()
        sender.join()
        server.start()
        names = [vm["name"] for vm in server.call("GET", "/vms", 200)]
        assert names in (["web"], ["copy", "web"])
        for name in names:
            file = server.vm_dir(name) / "disk.qcow2"
            subprocess.run(["qemu-img", "check", "-q", file], check=True, timeout=30)
            read = ["qemu-io", "-r", "-f", "qcow2", "-c", f"read -P {hit} 512M 6M", str(file)]
            seen = subprocess.run(read, capture_output=True, text=True, check=True, timeout=30)
            assert "verification failed" not in seen.stdout
        if "copy" in names:
            server.call("DELETE", "/vms/copy", 200)
        assert [*server.home.glob("vms/.staging/*"), *server.home.glob("vms/.trash/*")] == []
    server.call("POST", "/vms/clone", 200, json={"name": "web", "newName": "copy"})
