"""GET /lume/metrics, in Prometheus' text format; nothing is counted for it but requests' times."""

from __future__ import annotations

import asyncio
import bisect
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fastapi import APIRouter, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lumed.engine import Engine
from lumed.model.host import MachineUsage
from lumed.model.operation import Operation
from lumed.model.view import VmView
from lumed.model.vm import VmState

if TYPE_CHECKING:
    # Imported by the first who asks: it takes 44 ms.
    from prometheus_client import Metric

_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
_TEXT = "text/plain"


class RequestTimes:
    """How long answers took, by method, route and status."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str, str], list[int]] = {}
        self._sums: Counter[tuple[str, str, str]] = Counter()

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answer; route is a template, not a path, so that there are few."""
        key = (method if method in _METHODS else "other", route, str(status))
        counts = self._counts.setdefault(key, [0] * (len(_BUCKETS_S) + 1))
        counts[bisect.bisect_left(_BUCKETS_S, seconds)] += 1
        self._sums[key] += seconds  # type: ignore[assignment]

    def collect(self) -> Iterator[Metric]:
        """As a histogram. See prometheus_client's Collector."""
        from prometheus_client.core import HistogramMetricFamily

        family = HistogramMetricFamily(
            "lumed_request_duration_seconds",
            "Time from a request to the begin of its answer",
            labels=("method", "route", "status"),
        )
        for key, counts in list(self._counts.items()):
            limits = [*(str(limit) for limit in _BUCKETS_S), "+Inf"]
            totals = [sum(counts[: index + 1]) for index in range(len(counts))]
            family.add_metric(key, list(zip(limits, totals, strict=True)), self._sums[key])
        yield family


class Timing:
    """ASGI middleware that counts how long answers take."""

    def __init__(self, app: ASGIApp, times: RequestTimes) -> None:
        self._app = app
        self._times = times

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()

        async def send_timed(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")
                seconds = time.perf_counter() - started
                self._times.count(scope["method"], route, message["status"], seconds)
            await send(message)

        await self._app(scope, receive, send_timed)


def metric_routes(engine: Engine, times: RequestTimes) -> APIRouter:
    """/lume/metrics."""
    router = APIRouter(prefix="/lume", tags=["host"])

    @router.get(
        "/metrics",
        response_class=Response,
        responses={
            200: {
                "description": "Metrics in Prometheus' text format",
                "content": {_TEXT: {"schema": {"type": "string"}}},
            }
        },
        summary="VMs, machines, operations and requests in numbers",
    )
    async def get_metrics() -> Response:
        now = _Now(
            await engine.list_vms(), await engine.measure_machines(), engine.list_operations()
        )
        text, media_type = await asyncio.to_thread(_render, times, now)
        return Response(text, media_type=media_type)

    return router


class _Now:
    """What there is at the moment, as one of prometheus_client's collectors."""

    def __init__(
        self,
        vms: Sequence[VmView],
        machines: Sequence[MachineUsage],
        operations: Sequence[Operation],
    ) -> None:
        self._vms = vms
        self._machines = machines
        self._operations = operations

    def collect(self) -> Iterator[Metric]:
        """Everything but the times of requests."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        states = Counter(vm.state for vm in self._vms)
        by_state = GaugeMetricFamily("lumed_vms", "VMs by state", labels=("state",))
        for state in VmState:
            by_state.add_metric((state,), states[state])
        yield by_state

        labels = ("vm", "location")
        disk = GaugeMetricFamily(
            "lumed_vm_disk_allocated_bytes", "What a VM's disk takes on the host", labels=labels
        )
        for vm in self._vms:
            disk.add_metric((vm.name, vm.location_name), vm.disk_allocated_bytes)
        yield disk
        cpu = CounterMetricFamily(
            "lumed_vm_cpu_seconds", "Processor time of a VM's machine in this run", labels=labels
        )
        memory = GaugeMetricFamily(
            "lumed_vm_memory_bytes", "Memory of the host that a VM's machine holds", labels=labels
        )
        for machine in self._machines:
            cpu.add_metric((machine.name, machine.location_name), machine.cpu_seconds)
            memory.add_metric((machine.name, machine.location_name), machine.memory_bytes)
        yield cpu
        yield memory

        known = Counter((op.action, op.status.value) for op in self._operations)
        operations = GaugeMetricFamily(
            "lumed_operations", "Operations that are still known", labels=("action", "status")
        )
        for key, count in sorted(known.items()):
            operations.add_metric(key, count)
        yield operations


def _render(times: RequestTimes, now: _Now) -> tuple[bytes, str]:
    from prometheus_client import CollectorRegistry, ProcessCollector
    from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

    # No names are to be known before: each scrape has a registry of its own.
    registry = CollectorRegistry(auto_describe=False)
    registry.register(now)
    registry.register(times)
    ProcessCollector(registry=registry)
    return generate_latest(registry), CONTENT_TYPE_LATEST
