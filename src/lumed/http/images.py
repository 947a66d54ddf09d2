"""The routes of images: pull, push, build, list, delete, prune."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Response

from lumed.engine import Engine
from lumed.errors import NotPossibleHere
from lumed.http.bodies import BuildBody, CancelPullBody, PruneBody, PullBody, PushBody, Text
from lumed.http.replies import (
    ImageObject,
    MessageReply,
    OperationObject,
    PruneReply,
    PushReply,
    VmReply,
)
from lumed.http.shapes import image_object, json_response, operation_object, vm_object


def pull_routes(engine: Engine) -> APIRouter:
    """The document's pull, and today's three."""
    router = APIRouter(prefix="/lume", tags=["images"])

    @router.post(
        "/images/pull", response_model=VmReply, status_code=202, summary="Pull an image into a VM"
    )
    @router.post(
        "/pull/start",
        response_model=VmReply,
        status_code=202,
        operation_id="start_pull_as_today",
        summary="Pull an image into a VM",
    )
    async def start_pull(body: PullBody) -> Response:
        accepted = await engine.pull_vm(body.to_request())
        shape = {"message": "Pull started", **vm_object(accepted.vm), "image": body.image}
        return json_response(shape, 202)

    @router.post("/pull", response_model=MessageReply, summary="Pull an image and wait for the VM")
    async def pull_vm(body: PullBody) -> Response:
        accepted = await engine.pull_vm(body.to_request())
        # A client that hangs up ends this wait, and nothing else.
        await engine.finish_operation(accepted.operation.id)
        shape = {"message": "Image pulled successfully", "name": accepted.vm.name}
        return json_response({**shape, "image": body.image})

    @router.post("/pull/cancel", response_model=MessageReply, summary="Cancel the pull of a VM")
    async def cancel_pull(body: CancelPullBody) -> Response:
        await engine.cancel_pull(body.name)
        return json_response({"message": "Pull cancelled", "name": body.name})

    return router


def push_routes(engine: Engine) -> APIRouter:
    """From a VM to a registry."""
    router = APIRouter(prefix="/lume/vms", tags=["images"])

    @router.post(
        "/push", response_model=PushReply, status_code=202, summary="Push a stopped VM as an image"
    )
    async def push_vm(body: PushBody) -> Response:
        operation = await engine.push_vm(body.to_request())
        return json_response(
            {
                "message": "Push initiated in background",
                "name": body.name,
                "imageName": body.image_name,
                "tags": body.tags,
                "operation": operation.id,
            },
            202,
        )

    return router


def image_routes(engine: Engine) -> APIRouter:
    """The images in the cache."""
    router = APIRouter(prefix="/lume", tags=["images"])

    @router.get("/images", response_model=list[ImageObject], summary="The images in the cache")
    async def list_images(
        organization: Annotated[
            Text | None, Query(description="Only the images of this organization")
        ] = None,
    ) -> Response:
        images = map(image_object, await engine.list_images())
        return json_response([image for image in images if _is_of(image, organization)])

    @router.post(
        "/images/build",
        response_model=OperationObject,
        status_code=202,
        summary="Build a guest image from Debian's packages",
    )
    async def build_image(body: BuildBody) -> Response:
        operation = await engine.build_image(body.to_request())
        return json_response({"message": "Build started", **operation_object(operation)}, 202)

    @router.delete(
        "/images/{reference:path}", response_model=MessageReply, summary="Delete a cached image"
    )
    async def delete_image(
        reference: Annotated[str, Path(description="A name, a full reference, or an id")],
    ) -> Response:
        image = await engine.delete_image(reference)
        return json_response({"message": "Image deleted successfully", **image_object(image)})

    @router.get("/ipsw", response_model=MessageReply, summary="Not on this host: 501")
    async def get_ipsw() -> Response:
        raise NotPossibleHere(
            "An IPSW installs macOS, which needs Apple hardware and Apple's framework",
            hint="for Linux guests, GET /lume/images and the names of the catalog",
        )

    @router.post("/prune", response_model=PruneReply, summary="Remove the images nobody needs")
    async def prune_images(body: PruneBody | None = None, dryRun: bool = False) -> Response:  # noqa: N803
        dry_run = dryRun or bool(body and body.dry_run)
        pruned = await engine.prune_images(dry_run=dry_run)
        would = "Would remove cached images" if dry_run else "Successfully removed cached images"
        return json_response(
            {
                "message": would,
                "dryRun": dry_run,
                "removed": list(map(image_object, pruned.removed)),
                "kept": list(map(image_object, pruned.kept)),
                "freed": pruned.freed_bytes,
            }
        )

    return router


def _is_of(image: dict[str, Any], organization: str | None) -> bool:
    return not organization or str(image["repository"]).startswith(f"{organization}/")
