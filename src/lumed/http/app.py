"""The ASGI application: routes over an engine. What answers a listener is a guard over it."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI

from lumed import __version__
from lumed.engine import Engine
from lumed.http.errors import install_error_handlers
from lumed.http.events import event_routes
from lumed.http.host import config_routes, host_routes, operation_routes
from lumed.http.idempotency import Idempotency
from lumed.http.images import image_routes, pull_routes, push_routes
from lumed.http.logs import log_routes
from lumed.http.metrics import RequestTimes, Timing, metric_routes
from lumed.http.replies import DiskObject, ErrorObject
from lumed.http.shapes import speaks_compat
from lumed.http.vms import vm_routes
from lumed.units import GIB

# One status names the model and the rest refer to it: FastAPI builds a validator for each model
# of each route, which cost the first request 40 ms.
_ERROR_CONTENT = {
    "application/json": {"schema": {"$ref": f"#/components/schemas/{ErrorObject.__name__}"}}
}
_FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"description": description}
    | ({"model": ErrorObject} if status == 500 else {"content": _ERROR_CONTENT})
    for status, description in {
        400: "The body is no JSON object",
        401: "The token that this server wants is missing or wrong",
        403: "Refused: foreign Host or Origin",
        404: "No such VM, operation or route",
        409: "It exists, is in the wrong state, or is busy",
        413: "The body is too large",
        415: "Form and text bodies are refused",
        422: "A field is missing, of the wrong type or out of range",
        500: "A fault of the server or of a machine",
        501: "Not possible on this host",
        502: "A registry failed, refused, or sent wrong bytes",
        503: "QEMU, firmware or an accelerator is missing",
        504: "A machine did not answer in time",
        507: "No space",
    }.items()
}

_ABOUT = """The Lume API for Linux hosts.

Every write takes an `Idempotency-Key` header: the same request with the same key within 24 hours
has the same answer, and is carried out once."""


class _App(FastAPI):
    """FastAPI whose OpenAPI document is that of the listener which is asked for it."""

    def openapi(self) -> dict[str, Any]:
        """See FastAPI."""
        document = super().openapi()
        return _in_compat_words(document) if speaks_compat.get() else document


def build_app(engine: Engine, ending: asyncio.Event | None = None) -> FastAPI:
    """The application. Nothing but a Guard may stand between it and the world.

    ending is set when the server begins to end: whatever waits then has its answer at once.
    """
    ending = ending or asyncio.Event()
    app = _App(
        title="lumed",
        version=__version__,
        description=_ABOUT,
        docs_url="/docs",
        redoc_url=None,
        redirect_slashes=False,
        responses=_FAILURES,
        # The handlers' names: list_vms, run_vm, …; aliases say theirs.
        generate_unique_id_function=lambda route: route.name,
        # A request with a body and no content type is read as JSON (contract, section 4); the
        # guard has refused those that a web page could send.
        strict_content_type=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    install_error_handlers(app)
    app.add_middleware(Idempotency, engine=engine)
    times = RequestTimes()
    app.add_middleware(Timing, times=times)
    for router in (
        vm_routes(engine),
        pull_routes(engine),
        push_routes(engine),
        image_routes(engine),
        host_routes(engine),
        operation_routes(engine, ending),
        config_routes(engine),
        event_routes(engine, ending),
        log_routes(engine, ending),
        metric_routes(engine, times),
    ):
        app.include_router(router)
    return app


def _in_compat_words(document: dict[str, Any]) -> dict[str, Any]:
    """The document with `diskSize` in answers as the compat listener gives it."""
    disk_size = {"$ref": f"#/components/schemas/{DiskObject.__name__}"}
    schemas = dict(document["components"]["schemas"])
    for name, schema in schemas.items():
        properties = schema.get("properties", {})
        if not {"disk", "diskSize"} <= properties.keys():
            continue
        schemas[name] = {**schema, "properties": {**properties, "diskSize": disk_size}}
        schemas[name]["examples"] = [
            {**example, "diskSize": {"allocated": 8 * GIB, "total": 64 * GIB}}
            for example in schema.get("examples", ())
        ]
    return {**document, "components": {**document["components"], "schemas": schemas}}
