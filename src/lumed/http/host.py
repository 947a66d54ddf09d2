"""The routes of the host, its settings and its operations."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response

from lumed.engine import Engine
from lumed.http.bodies import ConfigBody, LocationBody
from lumed.http.replies import (
    ConfigObject,
    HostObject,
    LocationObject,
    LogsObject,
    MessageReply,
    OperationObject,
)
from lumed.http.shapes import host_object, json_response, operation_object


def host_routes(engine: Engine) -> APIRouter:
    """/lume/host/status and /lume/logs."""
    router = APIRouter(prefix="/lume", tags=["host"])

    @router.get("/host/status", response_model=HostObject, summary="The host in numbers")
    async def host_status() -> Response:
        return json_response(host_object(await engine.host_status()))

    @router.get("/logs", response_model=LogsObject, summary="The server's own logs")
    async def logs(
        type: Literal["info", "error", "all"] = "all",
        lines: Annotated[int | None, Query(ge=1, le=100_000)] = None,
    ) -> Response:
        return json_response(await engine.read_logs(type, lines))

    return router


def operation_routes(engine: Engine) -> APIRouter:
    """/lume/operations."""
    router = APIRouter(prefix="/lume/operations", tags=["operations"])

    @router.get("", response_model=list[OperationObject], summary="Operations, newest first")
    async def list_operations() -> Response:
        return json_response([operation_object(op) for op in engine.list_operations()])

    @router.get("/{id}", response_model=OperationObject, summary="One operation")
    async def get_operation(id: str) -> Response:
        return json_response(operation_object(engine.get_operation(id)))

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
