"""The figures of images: pull, push, a second VM, clone; against a registry on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from tests.registry.world import RunningRegistry, running_registry

from bench import tools
from bench.disk import StoredImage, make_disk, store_container_disk, store_slices
from bench.qemuimg import make_overlay, read_base
from bench.sampling import Row, Samples, median_row, ms_since, ratio_row
from bench.server import Client, Lumed, Process, create, wait_until

_CURL = "curl | tee >(sha256sum) | "
_ZSTD, _PIGZ, _TAR = f"{_CURL}zstd -d", f"{_CURL}pigz -dc", "curl | zstd -d | tar -x"
_SKOPEO = "skopeo copy + zstd -d"
_PIGZ_SKOPEO = "pigz -1 + skopeo copy"
_OPERATION_EVERY_S = 0.02


def measure_zstd_pull(lumed: Lumed, runs: int) -> Iterator[Row]:
    """A VM from slices packed by zstd, nothing of it cached."""
    with _serve_pulls(lumed) as (server, registry, disk, folder):
        image = store_slices(registry, disk, "zstd")
        others = {
            _ZSTD: partial(tools.pull_zstd_slices, folder, image),
            _SKOPEO: partial(tools.pull_by_skopeo, folder, registry.host, image),
        }
        samples = _pull_in_turns(server, registry, image, runs, others)
        yield _pull_row("zstd slices", samples, _ZSTD, 0.6)
        yield _pull_row("zstd slices", samples, _SKOPEO, 0.4)
        yield _peak_row("zstd slices", server)


def measure_gzip_pull(lumed: Lumed, runs: int) -> Iterator[Row]:
    """A VM from slices packed by gzip, as Lume pushes them."""
    with _serve_pulls(lumed) as (server, registry, disk, folder):
        image = store_slices(registry, disk, "gzip")
        others = {_PIGZ: partial(tools.pull_gzip_slices, folder, image)}
        samples = _pull_in_turns(server, registry, image, runs, others)
        yield _pull_row("gzip slices", samples, _PIGZ, 0.5)
        yield _peak_row("gzip slices", server)


def measure_container_pull(lumed: Lumed, runs: int) -> Iterator[Row]:
    """A VM from a container disk: one layer, a qcow2 file in tar in zstd."""
    with _serve_pulls(lumed) as (server, registry, disk, folder):
        image = store_container_disk(registry, disk)
        others = {_TAR: partial(tools.pull_container_disk, folder, image)}
        samples = _pull_in_turns(server, registry, image, runs, others)
        yield _pull_row("container disk", samples, _TAR, 1.0)
        yield _peak_row("container disk", server)


@contextlib.contextmanager
def _serve_pulls(lumed: Lumed) -> Iterator[tuple[Process, RunningRegistry, Path, Path]]:
    """A server with an empty home, a registry, the disk, and a folder for the others to make."""
    disk = make_disk(lumed.root / "images")
    with (
        running_registry(lumed.root / "registry") as registry,
        lumed.serve(lumed.root / "home-pull") as server,
    ):
        yield server, registry, disk, lumed.root / "by-tools"


def _pull_in_turns(
    server: Process,
    registry: RunningRegistry,
    image: StoredImage,
    runs: int,
    others: Mapping[str, Callable[[], tuple[float, float]]],
) -> Samples:
    samples: Samples = {"lumed": []}
    os.sync()  # what the registry got
    _pull_once(server.client, registry, image)  # what is loaded at first use is loaded
    for _ in range(_few(runs)):
        for who, pull in others.items():
            done_ms, synced_ms = pull()
            samples.setdefault(who, []).append(done_ms)
            samples.setdefault(_synced(who), []).append(synced_ms)
        samples["lumed"].append(_pull_once(server.client, registry, image))
    return samples


def _pull_row(what: str, samples: Samples, other: str, limit: float) -> Row:
    synced = _synced(other)
    return ratio_row(f"pull of {what}", samples, other, limit, also=synced)


def _peak_row(what: str, server: Process) -> Row:
    samples: Samples = {"lumed": [server.read_peak_mib()]}
    return median_row(f"memory at most, pulling {what}", samples, 250, unit="MiB")


def _synced(who: str) -> str:
    return f"{who}, synced"


def _pull_once(client: Client, registry: RunningRegistry, image: StoredImage) -> float:
    started = time.perf_counter()
    _pull(client, registry, image, "pulled")
    needed_ms = ms_since(started)
    client.send("DELETE", "/lume/vms/pulled")
    client.send("POST", "/lume/prune", {})
    if client.get("/lume/images"):
        raise RuntimeError("an image is left in the cache")
    return needed_ms


def _pull(client: Client, registry: RunningRegistry, image: StoredImage, name: str) -> None:
    where = {"registry": registry.host, "organization": "bench"}
    client.send("POST", "/lume/pull", {"image": image.name, "name": name, **where})


def measure_push(lumed: Lumed, runs: int) -> Iterator[Row]:
    """A VM's disk to a registry that has nothing of it."""
    disk = make_disk(lumed.root / "images")
    samples: Samples = {"lumed": [], _PIGZ_SKOPEO: []}
    with lumed.serve(lumed.root / "home-push") as server:
        create(server.client, "pushed", image=str(disk), disk_size="4GB")
        for number in range(_few(runs)):
            # Each time another port: skopeo remembers by it what a registry has.
            with running_registry(lumed.root / f"registry-skopeo-{number}") as registry:
                pushed = tools.push_by_skopeo(lumed.root / "by-tools", registry.host, disk)
                samples[_PIGZ_SKOPEO].append(pushed)
            os.sync()
            with running_registry(lumed.root / f"registry-lumed-{number}") as registry:
                samples["lumed"].append(_push_once(server.client, registry))
            os.sync()
            # What it knows of earlier pushes would spare it the compression.
            for record in (lumed.root / "home-push").rglob("pushes/*.jsonl"):
                record.unlink()
    yield ratio_row("push in Lume's format", samples, _PIGZ_SKOPEO, 0.7)


def _push_once(client: Client, registry: RunningRegistry) -> float:
    body = {"name": "pushed", "imageName": "pushed", "tags": ["1"], "organization": "bench"}
    started = time.perf_counter()
    reply = client.send("POST", "/lume/vms/push", {**body, "registry": registry.host})
    operation = json.loads(reply)["operation"]

    def has_ended() -> bool:
        found = client.get(f"/lume/operations/{operation}")
        if "failure" in found:
            raise RuntimeError(found["failure"])
        return "endedAt" in found

    wait_until(has_ended, "the push", every_s=_OPERATION_EVERY_S)
    return ms_since(started)


def measure_second(lumed: Lumed, runs: int) -> Iterator[Row]:
    """A second VM from an image that was pulled before: by create, and by another pull."""
    disk = make_disk(lumed.root / "images")
    created: Samples = {"lumed": [], "qemu-img": []}
    pulled: Samples = {"lumed": []}
    with contextlib.ExitStack() as stack:
        registry = stack.enter_context(running_registry(lumed.root / "registry"))
        server = stack.enter_context(lumed.serve(lumed.root / "home-second"))
        image = store_slices(registry, disk, "zstd")
        _pull(server.client, registry, image, "first")
        base = read_base(lumed.root / "home-second/vms/first/disk.qcow2")
        full_name = f"{registry.host}/bench/{image.name}"
        for number in range(2 * runs):
            overlay = lumed.root / f"second-{number}.qcow2"
            created["qemu-img"].append(make_overlay(base, overlay, "4G"))
            created["lumed"].append(
                create(server.client, f"made-{number}", image=full_name, disk_size="4GB")
            )
            started = time.perf_counter()
            _pull(server.client, registry, image, f"pulled-{number}")
            pulled["lumed"].append(ms_since(started))
            for name in (f"made-{number}", f"pulled-{number}"):
                server.client.send("DELETE", f"/lume/vms/{name}")
    yield median_row("second VM of a pulled image", created, 100)
    yield median_row("second pull of an image", pulled, 100)


def measure_clone(lumed: Lumed, runs: int) -> Iterator[Row]:
    """Clones of VMs with 64 MiB of data of their own since the last clone."""
    disk = make_disk(lumed.root / "images")
    home = lumed.root / "home-clone"
    with lumed.serve(home) as server:
        for size in ("4GB", "400GB"):
            samples: Samples = {"lumed": [], "qemu-img": []}
            for number in range(runs):
                create(server.client, "source", image=str(disk), disk_size=size)
                source = home / "vms/source/disk.qcow2"
                base = read_base(source)
                _write(source, 64)
                overlay = lumed.root / f"clone-{size}-{number}.qcow2"
                samples["qemu-img"].append(make_overlay(base, overlay, size.removesuffix("B")))
                started = time.perf_counter()
                server.client.send("POST", "/lume/vms/clone", {"name": "source", "newName": "copy"})
                samples["lumed"].append(ms_since(started))
                for name in ("copy", "source"):
                    server.client.send("DELETE", f"/lume/vms/{name}")
            yield median_row(f"clone of {size}", samples, 50)


def _write(disk: Path, mib: int) -> None:
    """Write data into a disk, durable."""
    command = ["qemu-io", "-f", "qcow2", "-c", f"write -q -P 90 1G {mib}M", "-c", "flush"]
    subprocess.run([*command, str(disk)], check=True)
    os.sync()


def _few(runs: int) -> int:
    """Runs of what takes seconds."""
    return max(3, runs // 3)
