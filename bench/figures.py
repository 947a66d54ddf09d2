"""The figures: what is measured, beside what, and the target of each.

Everything that is compared is measured in turns, so that a busy moment of the host hits all.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bench.images import (
    measure_clone,
    measure_container_pull,
    measure_gzip_pull,
    measure_push,
    measure_second,
    measure_zstd_pull,
)
from bench.libvirt import Libvirt, has_libvirt
from bench.qemuimg import make_overlay, read_base
from bench.rawqemu import RawQemu, read_argv
from bench.sampling import (
    Row,
    Samples,
    median_row,
    ms_since,
    percentile_row,
    wait_for_bytes,
    wait_for_end,
)
from bench.server import Client, EventStream, Lumed, Process, create, wait_until

_STATIC = ["-m", "bench.static_server"]
_RUN = "/lume/vms/bench/run"
_STOP = "/lume/vms/bench/stop"


def measure_run(lumed: Lumed, runs: int) -> Iterator[Row]:
    """Start and forced stop of one guest: lumed, raw QEMU and libvirt in turns."""
    first: Samples = {"lumed": [], "raw QEMU": [], "libvirt": []}
    stop: Samples = {"lumed": [], "raw QEMU": [], "libvirt": []}
    answers: dict[str, Samples] = {"kept": {"lumed": [], "libvirt": []}, "fresh": {"lumed": []}}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(lumed.serve())
        client, vm_dir = server.client, lumed.vm_dir("bench")
        create(client, "bench")
        # A run that does not count: what is loaded at first use is loaded, and QEMU's argv known.
        _run_once(client, vm_dir)
        pid = json.loads((vm_dir / "run.json").read_bytes())["process"]["pid"]
        argv, accelerator = read_argv(pid), client.get("/lume/vms/bench")["accelerator"]
        _stop_once(client, pid)
        raw = RawQemu(argv, vm_dir, lumed.root / "raw")
        libvirt = _start_libvirt(lumed, vm_dir, accelerator, stack)
        for number in range(2 * runs):
            raw_first, raw_quit = raw.run_once()
            first["raw QEMU"].append(raw_first)
            stop["raw QEMU"].append(raw_quit)

            kind = "kept" if number % 2 else "fresh"
            if kind == "fresh":
                client.drop()
            answer, first_byte = _run_once(client, vm_dir)
            answers[kind]["lumed"].append(answer)
            first["lumed"].append(first_byte)
            pid = json.loads((vm_dir / "run.json").read_bytes())["process"]["pid"]
            stop["lumed"].append(_stop_once(client, pid))

            if libvirt is not None:
                start, first_byte, destroy = libvirt.run_once()
                answers["kept"]["libvirt"].append(start)
                first["libvirt"].append(first_byte)
                stop["libvirt"].append(destroy)
    yield median_row("run to first serial byte", first, 50, less="raw QEMU")
    yield median_row("run to answer, kept connection", answers["kept"], 30)
    yield median_row("run to answer, fresh connection", answers["fresh"], 30)
    yield median_row("forced stop", stop, 50)


def _run_once(client: Client, vm_dir: Path) -> tuple[float, float]:
    """Milliseconds until the answer and until the first serial byte."""
    (vm_dir / "serial.log").unlink(missing_ok=True)
    started = time.perf_counter()
    client.send("POST", _RUN, {})
    answer_ms = ms_since(started)
    wait_for_bytes(vm_dir / "serial.log")
    return answer_ms, ms_since(started)


def _stop_once(client: Client, pid: int) -> float:
    started = time.perf_counter()
    client.send("POST", _STOP, {"force": True})
    wait_for_end(pid)
    return ms_since(started)


def _start_libvirt(
    lumed: Lumed, vm_dir: Path, accelerator: str, stack: contextlib.ExitStack
) -> Libvirt | None:
    if not has_libvirt():
        return None
    base = read_base(vm_dir / "disk.qcow2")
    libvirt = Libvirt(lumed.root / "libvirt", base, accelerator)
    stack.callback(libvirt.close)
    libvirt.run_once()
    return libvirt


def measure_create(lumed: Lumed, runs: int) -> Iterator[Row]:
    """Create from a cached image, beside the disk alone."""
    samples: Samples = {"lumed": [], "qemu-img": []}
    with lumed.serve() as server:
        create(server.client, "first")
        base = read_base(lumed.vm_dir("first") / "disk.qcow2")
        for number in range(2 * runs):
            samples["qemu-img"].append(make_overlay(base, lumed.root / f"overlay-{number}.qcow2"))
            samples["lumed"].append(create(server.client, f"made-{number}"))
            server.client.send("DELETE", f"/lume/vms/made-{number}")
    yield median_row("create from a cached image", samples, 100)


def measure_list(lumed: Lumed, runs: int) -> Iterator[Row]:
    """Lists of 200 and of 2,000 VMs, beside a server that only knows this reply."""
    few = _list_often(lumed, 200, 100 * runs)
    yield percentile_row("list of 200, p50", few, 50, 3)
    yield percentile_row("list of 200, p99", few, 99, 10)
    many = _list_often(lumed, 2000, 20 * runs)
    yield percentile_row("list of 2,000, p99", many, 99, 50)


def _list_often(lumed: Lumed, vms: int, requests: int) -> Samples:
    samples: Samples = {"lumed": [], "bare uvicorn": []}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(lumed.serve(lumed.home_with_vms(vms)))
        body = server.client.send("GET", "/lume/vms")
        static = stack.enter_context(_serve_static(lumed, body))
        static.client.send("GET", "/lume/vms")
        # Our own collector must not be what is measured.
        gc.disable()
        stack.callback(gc.enable)
        for _ in range(requests):
            for who, client in (("lumed", server.client), ("bare uvicorn", static.client)):
                started = time.perf_counter()
                client.send("GET", "/lume/vms")
                samples[who].append(ms_since(started))
    return samples


@contextlib.contextmanager
def _serve_static(lumed: Lumed, body: bytes) -> Iterator[Process]:
    file = lumed.root / "reply.json"
    file.write_bytes(body)
    server = Process([*_STATIC, str(file)], lumed.bytecode)
    try:
        yield server
    finally:
        server.close()


def measure_server(lumed: Lumed, runs: int) -> Iterator[Row]:
    """Start of the server and its memory, with 200 VMs on disk."""
    home = lumed.home_with_vms(200)
    ready: Samples = {"lumed": [], "bare uvicorn": []}
    memory: Samples = {"lumed": [], "lumed, PSS": [], "bare uvicorn": []}
    with lumed.serve(home) as server:
        body = server.client.send("GET", "/lume/vms")
    with _serve_static(lumed, body):
        pass
    for _ in range(runs):
        with _serve_static(lumed, body) as server:
            server.client.send("GET", "/lume/vms")
            ready["bare uvicorn"].append(ms_since(server.started))
            memory["bare uvicorn"].append(server.read_memory_mib())
        with lumed.serve(home) as server:
            server.client.send("GET", "/lume/vms")
            ready["lumed"].append(ms_since(server.started))
            memory["lumed"].append(server.read_memory_mib())
            memory["lumed, PSS"].append(server.read_memory_mib("Pss"))
    yield median_row("start to first list of 200", ready, 600)
    yield median_row("memory after one list of 200", memory, 60, unit="MiB")


def measure_command(lumed: Lumed, runs: int) -> Iterator[Row]:
    """`lume ls` as a whole process, with 200 VMs; beside it a Python that does nothing."""
    samples: Samples = {"lumed": [], "python -c pass": []}
    home = lumed.home_with_vms(200)
    with lumed.serve(home):
        for _ in range(2 * runs):
            samples["python -c pass"].append(lumed.run_python("-c", "pass"))
            ls = lumed.run_python("-m", "lumed", "ls", "--no-start", "--home", str(home))
            samples["lumed"].append(ls)
    yield median_row("lume ls, 200 VMs", samples, 150)


def measure_memory(lumed: Lumed, runs: int) -> Iterator[Row]:
    """What running VMs add to the server's memory; the first one also loads what running needs."""
    del runs
    names = [f"guest-{number}" for number in range(6)]
    with lumed.serve() as server:
        for name in names:
            create(server.client, name)
        measured: list[float] = []
        for name in names:
            server.client.send("POST", f"/lume/vms/{name}/run", {})
            wait_until(partial(_is_ready, server, name), f"{name} ready")
            server.client.send("GET", "/lume/vms")
            measured.append(server.read_memory_mib())
        more = (measured[-1] - measured[0]) / (len(measured) - 1)
    numbers = {"lumed": more, "all with 1 VM": measured[0], "all with 6 VMs": measured[-1]}
    samples = {"all": measured}
    yield Row("memory for one more running VM", "MiB", numbers, more, 1, samples=samples)


def measure_events(lumed: Lumed, runs: int) -> Iterator[Row]:
    """From the end of a machine that is killed to those who watch, the last of 1 and of 64."""
    samples: Samples = {"lumed": [], "last of 64": []}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(lumed.serve())
        create(server.client, "watched")
        streams: list[EventStream] = []
        for who, watchers in (("lumed", 1), ("last of 64", 64)):
            while len(streams) < watchers:
                streams.append(EventStream(server.url))
                stack.callback(streams[-1].close)
            for _ in range(runs):
                server.client.send("POST", "/lume/vms/watched/run", {})
                for stream in streams:
                    stream.wait_for("watched", "running")
                record = json.loads((lumed.vm_dir("watched") / "run.json").read_bytes())
                started = time.perf_counter()
                os.kill(record["process"]["pid"], signal.SIGKILL)
                for stream in streams:
                    stream.wait_for("watched", "crashed")
                samples[who].append(ms_since(started))
    yield median_row("a machine's end to its watchers", samples, 50)


def _is_ready(server: Process, name: str) -> bool:
    return "ipAddress" in server.client.get(f"/lume/vms/{name}")


def measure_idle(lumed: Lumed, runs: int) -> Iterator[Row]:
    """Wake-ups in 10 s while nothing runs and nobody asks."""
    del runs
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(lumed.serve(lumed.home_with_vms(200)))
        body = server.client.send("GET", "/lume/vms")
        static = stack.enter_context(_serve_static(lumed, body))
        static.client.send("GET", "/lume/vms")
        time.sleep(2)  # what a start leaves to do is done
        before = server.count_switches(), static.count_switches()
        time.sleep(10)
        after = server.count_switches(), static.count_switches()
    numbers = {"lumed": after[0] - before[0], "bare uvicorn": after[1] - before[1]}
    yield Row("wake-ups in 10 s, idle", "", numbers, numbers["lumed"], 0)


FIGURES: dict[str, Callable[[Lumed, int], Iterator[Row]]] = {
    "run": measure_run,
    "create": measure_create,
    "list": measure_list,
    "server": measure_server,
    "command": measure_command,
    "memory": measure_memory,
    "idle": measure_idle,
    "events": measure_events,
    "pull-zstd": measure_zstd_pull,
    "pull-gzip": measure_gzip_pull,
    "pull-container": measure_container_pull,
    "push": measure_push,
    "second": measure_second,
    "clone": measure_clone,
}
