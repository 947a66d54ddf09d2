"""GET /lume/metrics, as a Prometheus server reads it."""

from __future__ import annotations

import re

from prometheus_client.parser import text_string_to_metric_families

from tests.doubles.fake_driver import FakeDriver
from tests.http.conftest import Client
from tests.http.test_vms import SMALL, VMS, create, run

Sample = tuple[str, frozenset[tuple[str, str]]]


async def scrape(client: Client) -> dict[Sample, float]:
    reply = await client.get("/lume/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
    }


def sample(metric: str, **labels: str) -> Sample:
    return metric, frozenset(labels.items())


async def test_vms_machines_and_operations_are_counted(client: Client, driver: FakeDriver) -> None:
    empty = await scrape(client)
    assert empty[sample("lumed_vms", state="running")] == 0
    assert not [name for name, _ in empty if name.startswith("lumed_vm_")]
    await create(client, "web", image="tiny")
    await create(client, "off", image="tiny", storage="ssd")
    await run(client, "web", noDisplay=True)
    reply = await client.get("/lume/operations", params={"target": "web", "action": "run"})
    await client.get(f"/lume/operations/{reply.json()[0]['id']}", params={"wait": 10})
    found = await scrape(client)
    assert found[sample("lumed_vms", state="running")] == 1
    assert found[sample("lumed_vms", state="stopped")] == 1
    web = {"vm": "web", "location": "home"}
    assert found[sample("lumed_vm_cpu_seconds_total", **web)] >= 0
    assert 100_000 < found[sample("lumed_vm_memory_bytes", **web)] < 100_000_000
    vm = (await client.get(f"{VMS}/off")).json()
    off = {"vm": "off", "location": "ssd"}
    disk = found[sample("lumed_vm_disk_allocated_bytes", **off)]
    assert disk == vm["disk"]["allocated"]
    assert sample("lumed_vm_memory_bytes", **off) not in found
    assert found[sample("lumed_operations", action="create", status="succeeded")] == 2
    assert found[sample("lumed_operations", action="run", status="succeeded")] == 1
    assert found[sample("process_resident_memory_bytes")] > 10_000_000
    driver.machines[-1].crash()


async def test_requests_are_counted_by_route_not_by_path(client: Client) -> None:
    for number in range(5):
        await client.get(f"{VMS}/vm-{number}")
        await client.get(f"/odd/{number}")
    await client.request("BREW", VMS)
    key = {"Idempotency-Key": "a"}
    for _ in range(2):
        await client.post(VMS, json={"name": "web", **SMALL}, headers=key)
    found = await scrape(client)
    count, bucket = "lumed_request_duration_seconds_count", "lumed_request_duration_seconds_bucket"
    one = {"method": "GET", "route": "/lume/vms/{name}", "status": "404"}
    assert found[sample(count, **one)] == 5
    assert found[sample(bucket, **one, le="+Inf")] == 5
    assert 0 < found[sample("lumed_request_duration_seconds_sum", **one)] < 10
    assert found[sample(count, method="GET", route="none", status="404")] == 5
    assert found[sample(count, method="other", route="/lume/vms", status="405")] == 1
    assert found[sample(count, method="POST", route="/lume/vms", status="202")] == 1
    # The answer that was kept reached no route.
    assert found[sample(count, method="POST", route="none", status="202")] == 1
    routes = {dict(labels).get("route", "") for _, labels in found}
    assert not [route for route in routes if re.search(r"\d", route)]
