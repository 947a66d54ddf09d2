"""The routes of the host, its settings and its operations."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from lumed.engine import Engine
from lumed.http.bodies import ConfigBody, LocationBody
from lumed.http.replies import (
    ConfigObject,
    HostObject,
    LocationObject,
    MessageReply,
    OperationObject,
)
from lumed.http.shapes import host_object, json_response, operation_object
from lumed.http.streams import wait_unless
from lumed.model.operation import OperationStatus

_LONGEST_WAIT_S = 60


def host_routes(engine: Engine) -> APIRouter:
    """/lume/host/status."""
    router = APIRouter(prefix="/lume", tags=["host"])

    @router.get("/host/status", response_model=HostObject, summary="The host in numbers")
    async def get_host_status() -> Response:
        return json_response(host_object(await engine.host_status()))

    return router


def operation_routes(engine: Engine, ending: asyncio.Event) -> APIRouter:
    """/lume/operations; who waits for one has an answer when `ending` is set."""
    router = APIRouter(prefix="/lume/operations", tags=["operations"])

    @router.get("", response_model=list[OperationObject], summary="Operations, newest first")
    async def list_operations(
        status: OperationStatus | None = None,
        target: Annotated[str | None, Query(description="A VM's or an image's name")] = None,
        action: Annotated[str | None, Query(examples=["run"])] = None,
    ) -> Response:
        found = [
            operation_object(op)
            for op in engine.list_operations()
            if status in (None, op.status)
            and target in (None, op.target)
            and action in (None, op.action)
        ]
        return json_response(found)

    @router.get("/{id}", response_model=OperationObject, summary="One operation")
    async def get_operation(
        id: str,
        wait: Annotated[
            float,
            Query(
                ge=0,
                le=_LONGEST_WAIT_S,
                allow_inf_nan=False,
                description="Seconds to wait for its end; the answer is how it is then",
            ),
        ] = 0,
    ) -> Response:
        operation = engine.get_operation(id)
        if wait and not operation.is_over:
            over = await wait_unless(ending, engine.wait_operation(id, wait))
            operation = over or engine.get_operation(id)
        return json_response(operation_object(operation))

    @router.post("/{id}/cancel", response_model=OperationObject, summary="Cancel an operation")
    async def cancel_operation(id: str) -> Response:
        return json_response(operation_object(await engine.cancel_operation(id)))

    return router


def config_routes(engine: Engine) -> APIRouter:
    """/lume/config and its locations."""
    router = APIRouter(prefix="/lume/config", tags=["config"])

    def locations() -> list[dict[str, str]]:
        return [
            {"name": name, "path": str(path)} for name, path in sorted(engine.locations().items())
        ]

    @router.get("", response_model=ConfigObject, summary="The settings in force")
    async def get_config() -> Response:
        settings = engine.settings()
        shape: dict[str, Any] = {
            "vmLocations": locations(),
            "defaultLocationName": settings.default_location,
            "cacheDirectory": settings.cache_directory,
            "cachingEnabled": settings.caching_enabled,
            "telemetryEnabled": False,
            "defaultImage": settings.default_image,
            "registry": {
                "type": "ghcr",
                "ghcr": {
                    "registry": settings.registry,
                    "organization": settings.organization,
                },
            },
        }
        return json_response(shape)

    @router.post("", response_model=MessageReply, summary="Change settings")
    async def change_config(body: ConfigBody) -> Response:
        await engine.change_settings(body.to_request())
        return json_response({"message": "Configuration updated successfully"})

    @router.get("/locations", response_model=list[LocationObject], summary="Storage locations")
    async def list_locations() -> Response:
        return json_response(locations())

    @router.post("/locations", response_model=MessageReply, summary="Add a storage location")
    async def add_location(body: LocationBody) -> Response:
        path = await engine.add_location(body.name, body.path)
        return json_response(
            {"message": "Location added successfully", "name": body.name, "path": str(path)}
        )

    @router.delete(
        "/locations/{name}", response_model=MessageReply, summary="Forget a storage location"
    )
    async def remove_location(name: str) -> Response:
        await engine.remove_location(name)
        return json_response({"message": "Location removed successfully"})

    @router.post(
        "/locations/default/{name}",
        response_model=MessageReply,
        summary="Choose the default storage location",
    )
    async def set_default_location(name: str) -> Response:
        await engine.set_default_location(name)
        return json_response({"message": "Default location set successfully"})

    return router
