"""The routes of VMs."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Path, Query, Response

from lumed.engine import Engine
from lumed.errors import InvalidField, NotFound, NotPossibleHere
from lumed.http.bodies import CloneBody, CreateBody, RunBody, StopBody, Text, UpdateBody
from lumed.http.replies import CloneReply, MessageReply, VmObject, VmReply
from lumed.http.shapes import VmListEncoder, json_response, vm_object
from lumed.naming import check_vm_name

Storage = Annotated[
    Text | None, Query(description="A location's name (ssd, hdd, …) or an absolute path")
]
Name = Annotated[str, Path(description="The VM's name", examples=["lume_vm"])]


def vm_routes(engine: Engine) -> APIRouter:
    """Everything under /lume/vms."""
    router = APIRouter(prefix="/lume/vms", tags=["vms"])
    encoder = VmListEncoder()

    @router.get("", response_model=list[VmObject], summary="List all virtual machines")
    async def list_vms(storage: Storage = None) -> Response:
        return encoder.response(await engine.list_vms(storage or None))

    @router.post(
        "", response_model=VmReply, status_code=202, summary="Create a new virtual machine"
    )
    async def create_vm(body: CreateBody) -> Response:
        accepted = await engine.create_vm(body.to_request())
        return json_response({"message": "VM creation started", **vm_object(accepted.vm)}, 202)

    @router.post("/clone", response_model=CloneReply, summary="Clone a stopped virtual machine")
    async def clone_vm(body: CloneBody) -> Response:
        vm = await engine.clone_vm(body.to_request())
        names = {"source": body.name, "destination": body.new_name}
        return json_response({"message": "VM cloned successfully", **names, **vm_object(vm)})

    @router.get("/{name}", response_model=VmObject, summary="Get details of a virtual machine")
    async def get_vm(name: Name, storage: Storage = None) -> Response:
        return json_response(vm_object(await engine.get_vm(vm_name(name), storage or None)))

    @router.put("/{name}", response_model=VmReply, summary="Update a stopped virtual machine")
    @router.patch(
        "/{name}",
        response_model=VmReply,
        operation_id="update_vm_by_patch",
        summary="Update a stopped virtual machine",
    )
    @router.post(
        "/{name}/update",
        response_model=VmReply,
        operation_id="update_vm_by_post",
        summary="Update a stopped virtual machine",
    )
    async def update_vm(name: Name, body: UpdateBody, storage: Storage = None) -> Response:
        request = body.to_request()
        request = replace(request, storage=request.storage or storage or None)
        vm = await engine.update_vm(vm_name(name), request)
        return json_response({"message": "VM settings updated successfully", **vm_object(vm)})

    @router.post(
        "/{name}/run", response_model=VmReply, status_code=202, summary="Run a virtual machine"
    )
    async def run_vm(name: Name, body: RunBody | None = None, storage: Storage = None) -> Response:
        request = (body or RunBody.model_validate({})).to_request()
        request = replace(request, storage=request.storage or storage or None)
        accepted = await engine.run_vm(vm_name(name), request)
        return json_response({"message": "VM start initiated", **vm_object(accepted.vm)}, 202)

    @router.post("/{name}/stop", response_model=VmReply, summary="Stop a running virtual machine")
    async def stop_vm(
        name: Name,
        body: StopBody | None = None,
        storage: Storage = None,
        force: bool = False,
    ) -> Response:
        place = (body.storage if body else None) or storage or None
        at_once = force or bool(body and body.force)
        vm = await engine.stop_vm(vm_name(name), place, force=at_once)
        return json_response({"message": "VM stopped successfully", **vm_object(vm)})

    @router.get(
        "/{name}/screenshot",
        response_class=Response,
        responses={200: {"content": {"image/png": {}}, "description": "The screen as PNG"}},
        summary="Take a picture of a running virtual machine's screen",
    )
    async def take_screenshot(name: Name, storage: Storage = None) -> Response:
        picture = await engine.take_screenshot(vm_name(name), storage or None)
        return Response(picture, media_type="image/png")

    @router.post("/{name}/setup", response_model=MessageReply, summary="Not on this host: 501")
    async def setup_vm(name: Name) -> Response:
        await engine.get_vm(vm_name(name))
        raise NotPossibleHere(
            "The setup assistant is macOS's, which needs Apple hardware and Apple's framework",
            hint="Linux guests are set up by cloud-init: see userData and sshKeys of a create",
        )

    @router.delete("/{name}", response_model=MessageReply, summary="Delete a virtual machine")
    async def delete_vm(name: Name, storage: Storage = None) -> Response:
        await engine.delete_vm(vm_name(name), storage or None)
        return json_response({"message": "VM deleted successfully", "name": name})

    return router


def vm_name(name: str) -> str:
    """The name in a path. One that no VM can have is a VM that does not exist."""
    try:
        return check_vm_name(name)
    except InvalidField as error:
        raise NotFound(f"Virtual machine not found: {name:.80}", hint=error.message) from None
