"""What /openapi.json says is what the API does."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from typing import Any, cast

import httpx2 as httpx
import hypothesis
import pytest
import requests
import schemathesis
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from lumed.errors import ToolFailed
from lumed.http.app import build_app
from lumed.store.layout import Home
from tests.doubles.fake_driver import FakeDriver
from tests.http.conftest import Client
from tests.http.live import serve_fake_engine

SMALL = {"name": "lume_vm", "os": "linux", "cpu": 1, "memory": "64MB", "diskSize": "64MB"}
# Issue and contract: what is not possible here, what is missing, no space, no answer in time.
EXPECTED_5XX = {501, 502, 503, 504, 507}

document = build_app(cast(Any, None)).openapi()
# A stream has no end to wait for: tests/http/test_events.py reads it.
schema = schemathesis.openapi.from_dict(document).exclude(path="/lume/events")


# Examples of each operation; more by hand: LUMED_EXAMPLES=1000.
EXAMPLES = int(os.environ.get("LUMED_EXAMPLES", "20"))

# Fields that name a folder or a file of this host. Where they lead is other tests' matter.
_PATHS = {"storage", "path", "homeDirectory", "cacheDirectory", "hostPath", "mount", "image"}


def keep_inside(value: Any) -> Any:
    """A generated value without the letters that could lead to a folder outside of the home."""
    if isinstance(value, list):
        return [keep_inside(part) for part in value]
    if not isinstance(value, dict):
        return value
    tame = {}
    for key, part in value.items():
        tame[key] = keep_inside(part)
        if key in _PATHS and isinstance(part, str) and part != "~/Projects":
            tame[key] = part.replace("/", "_")
    return tame


def aim(case: schemathesis.Case[Any], vms: VmsOfServer) -> None:
    """Let every other case hit: a VM that exists, a size that fits."""
    case.body, case.query = keep_inside(case.body), keep_inside(case.query)
    body: Any = case.body
    if isinstance(body, dict) and isinstance(body.get("network"), str):
        # A bridge would be made for real.
        body["network"] = body["network"].replace("bridged", "bridge")
    if case.path == "/lume/vms" and isinstance(body, dict) and len(body) % 2:
        body |= {key: SMALL[key] for key in ("memory", "diskSize")}
    if isinstance(case.query, dict):
        # Answers that end when something happens, or never.
        case.query.pop("follow", None)
    if isinstance(case.query, dict) and isinstance(case.query.get("wait"), int | float):
        case.query["wait"] = min(case.query["wait"], 0.01)
    parameters = case.path_parameters or {}
    for key, target in (("name", vms.make), ("id", vms.last_operation)):
        value = parameters.get(key)
        if isinstance(value, str) and len(value) % 2 and "config" not in case.path:
            parameters[key] = target()


class VmsOfServer:
    """Something for the cases to hit."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._client = httpx.Client(base_url=f"{url}/lume")
        self.session = requests.Session()

    def make(self) -> str:
        """The name of a VM that exists."""
        name = str(SMALL["name"])
        if self._client.post("/vms", json=SMALL).status_code == 202:
            while self._client.get(f"/vms/{name}").json().get("state") == "provisioning":
                pass
        return name

    def last_operation(self) -> str:
        """The id of an operation that exists."""
        self.make()
        return str(self._client.get("/operations").json()[0]["id"])

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()
        self.session.close()


def _find_no_host(host: object, *arguments: object, **options: object) -> list[Any]:
    if host in ("127.0.0.1", "localhost"):
        return _getaddrinfo(host, *arguments, **options)  # type: ignore[arg-type]
    raise socket.gaierror(socket.EAI_NONAME, "tests look nothing up")


def _build_nothing(*_: object) -> None:
    raise ToolFailed("tests of the API's shapes build nothing")


_getaddrinfo = socket.getaddrinfo


@pytest.fixture(scope="module")
def vms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VmsOfServer]:
    folder = tmp_path_factory.mktemp("openapi")
    (folder / "Projects").mkdir()
    home = Home(folder / "home")
    home.prepare()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        # Whatever registry a request names, no packet leaves this host.
        patch.setattr(socket, "getaddrinfo", _find_no_host)
        patch.setattr("lumed.images.build._build", _build_nothing)
        with serve_fake_engine(home, FakeDriver()) as url:
            vms = VmsOfServer(url)
            yield vms
            vms.close()


@schema.parametrize()
@hypothesis.settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None)
def test_no_request_is_a_fault_and_every_answer_is_as_documented(
    case: schemathesis.Case[Any], vms: VmsOfServer
) -> None:
    aim(case, vms)
    response = case.call(base_url=vms.url, session=vms.session)
    assert response.status_code < 500 or response.status_code in EXPECTED_5XX
    # One client knows failure only by this key; of the logs, it is Lume's name for one of them.
    if response.status_code < 400 and case.path != "/lume/logs":
        assert b'"error":' not in response.content
    case.validate_response(
        response,
        checks=[content_type_conformance, response_schema_conformance, status_code_conformance],
    )


# The document's requests, as it prints them.
DOCUMENT: dict[str, dict[str, Any]] = {
    "CreateBody": {
        "name": "lume_vm",
        "os": "macOS",
        "cpu": 2,
        "memory": "4GB",
        "diskSize": "64GB",
        "display": "1024x768",
        "ipsw": "latest",
        "storage": "ssd",
    },
    "RunBody": {
        "noDisplay": False,
        "sharedDirectories": [{"hostPath": "~/Projects", "readOnly": False}],
        "recoveryMode": False,
        "storage": "ssd",
    },
    "PullBody": {
        "image": "macos-sequoia-vanilla:latest",
        "registry": "ghcr.io",
        "organization": "trycua",
        "storage": "ssd",
    },
    "UpdateBody": {
        "cpu": 4,
        "memory": "8GB",
        "diskSize": "100GB",
        "display": "1920x1080",
        "storage": "ssd",
    },
}
ROUTES = {
    ("post", "/lume/vms", "CreateBody"),
    ("get", "/lume/vms", None),
    ("get", "/lume/vms/{name}", None),
    ("put", "/lume/vms/{name}", "UpdateBody"),
    ("patch", "/lume/vms/{name}", "UpdateBody"),
    ("post", "/lume/vms/{name}/update", "UpdateBody"),
    ("post", "/lume/vms/{name}/run", "RunBody"),
    ("post", "/lume/vms/{name}/stop", "StopBody"),
    ("delete", "/lume/vms/{name}", None),
    ("post", "/lume/images/pull", "PullBody"),
    ("post", "/lume/pull", "PullBody"),
    ("post", "/lume/pull/start", "PullBody"),
    ("post", "/lume/pull/cancel", "CancelPullBody"),
    ("post", "/lume/vms/clone", "CloneBody"),
    ("post", "/lume/vms/push", "PushBody"),
    ("get", "/lume/images", None),
    ("get", "/lume/ipsw", None),
    ("post", "/lume/vms/{name}/setup", None),
    ("delete", "/lume/images/{reference}", None),
    ("post", "/lume/images/build", "BuildBody"),
    ("post", "/lume/prune", "PruneBody"),
    ("get", "/lume/host/status", None),
    ("get", "/lume/logs", None),
    ("get", "/lume/vms/{name}/logs", None),
    ("get", "/lume/config", None),
    ("post", "/lume/config", "ConfigBody"),
    ("get", "/lume/config/locations", None),
    ("post", "/lume/config/locations", "LocationBody"),
    ("delete", "/lume/config/locations/{name}", None),
    ("post", "/lume/config/locations/default/{name}", None),
    ("get", "/lume/operations", None),
    ("get", "/lume/operations/{id}", None),
    ("post", "/lume/operations/{id}/cancel", None),
}


@pytest.mark.parametrize(("method", "path", "body"), sorted(ROUTES, key=str))
def test_every_route_is_documented_with_its_body(method: str, path: str, body: str | None) -> None:
    operation = document["paths"][path][method]
    assert operation["summary"]
    assert (body or "Body") in str(operation.get("requestBody", "Body"))
    success = [status for status in operation["responses"] if status.startswith("2")]
    assert len(success) == 1
    assert "$ref" in str(operation["responses"][success[0]]["content"]["application/json"])


def test_the_stream_is_documented() -> None:
    operation = document["paths"]["/lume/events"]["get"]
    assert list(operation["responses"]["200"]["content"]) == ["text/event-stream"]
    names = {parameter["name"] for parameter in operation["parameters"]}
    assert names == {"vm", "last-event-id", "lastEventId"}


def test_each_operation_has_a_short_id_of_its_own() -> None:
    paths = document["paths"].values()
    ids = [operation["operationId"] for path in paths for operation in path.values()]
    assert len(set(ids)) == len(ids)
    assert {"list_vms", "create_vm", "get_vm", "update_vm", "run_vm", "stop_vm"} <= set(ids)
    # As a generator of clients names its methods: a verb, and what it is done to.
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+){1,3}", id) for id in ids), ids


@pytest.mark.parametrize("name", DOCUMENT)
def test_the_documents_examples_are_shown(name: str) -> None:
    shown = document["components"]["schemas"][name]
    assert shown["examples"] == [DOCUMENT[name]]
    assert shown["properties"].keys() >= DOCUMENT[name].keys()


def test_the_documents_answer_is_shown() -> None:
    (shown,) = document["components"]["schemas"]["VmObject"]["examples"]
    assert shown["ipAddress"] == "192.168.65.2"
    assert shown["sharedDirectories"][0]["tag"] == "com.apple.virtio-fs.automount"
    assert document["components"]["schemas"]["VmObject"]["properties"].keys() >= shown.keys()


def test_the_documents_required_fields_are_the_required_ones() -> None:
    required = document["components"]["schemas"]["CreateBody"]["required"]
    assert required == ["name", "os", "cpu", "memory", "diskSize"]
    for name in ("RunBody", "UpdateBody", "StopBody", "ConfigBody"):
        assert "required" not in document["components"]["schemas"][name]


async def test_the_docs_page_shows_the_document_that_is_served(client: Client) -> None:
    assert (await client.get("/openapi.json")).json() == document
    reply = await client.get("/docs")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/html")
    assert "/openapi.json" in reply.text
