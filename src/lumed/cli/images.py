"""The commands of images: from registries, to registries, and what the cache holds."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from lumed.cli.bars import follow
from lumed.cli.link import Link
from lumed.cli.names import ImageName, VmName
from lumed.cli.output import Column, say, show, show_data, show_table
from lumed.cli.vms import AsFormat, Storage, UnneededFlag
from lumed.errors import LumedError, NotFound, NotPossibleHere, PullFailed
from lumed.units import describe_size

if TYPE_CHECKING:
    from lumed.client.client import Client
    from lumed.client.models import Image

Registry = Annotated[str | None, Parameter(help="registry host, perhaps with a port")]
Organization = Annotated[str | None, Parameter(help="the part before the image's name")]
Username = Annotated[str | None, Parameter(help="login at the registry")]
Password = Annotated[str | None, Parameter(help="better: --password-stdin, or docker login")]
PasswordStdin = Annotated[bool, Parameter(negative="", help="read the password from stdin")]
ImageFormat = Annotated[
    Literal["lume", "containerdisk"], Parameter(help="what the registry is to get")
]
Tags = Annotated[
    list[str] | None, Parameter(help="more tags", consume_multiple=True, negative_iterable="")
]


def pull(
    image: ImageName,
    name: str | None = None,
    /,
    *,
    registry: Registry = None,
    organization: Organization = None,
    storage: Storage = None,
    username: Username = None,
    password: Password = None,
    password_stdin: PasswordStdin = False,
    force: Annotated[
        bool, Parameter(negative="", help="replace a virtual machine of that name")
    ] = False,
    verbose: UnneededFlag = False,
    link: Link = Link(),  # noqa: B008
) -> None:
    """Make a virtual machine from an image of a registry.

    Example: lume pull ubuntu-noble:latest web --organization trycua
    """
    secret = _get_password(password, password_stdin)
    with link.connect() as client:
        if force and name is not None:
            _delete_if_there(client, name, storage)
        vm = client.pull_vm(
            image,
            name,
            registry=registry,
            organization=organization,
            storage=storage,
            username=username,
            password=secret,
        )
        if vm.operation is not None:
            follow(client, vm.operation)
    say(f"{vm.name} is made from {image}; start it: lume run {vm.name}")


def push(
    name: VmName,
    image: str,
    /,
    *,
    additional_tags: Tags = None,
    registry: Registry = None,
    organization: Organization = None,
    storage: Storage = None,
    chunk_size_mb: Annotated[int, Parameter(help="how much of the disk a slice holds")] = 512,
    single_layer: Annotated[bool, Parameter(negative="")] = False,
    image_format: ImageFormat = "lume",
    username: Username = None,
    password: Password = None,
    password_stdin: PasswordStdin = False,
    dry_run: Annotated[bool, Parameter(negative="", help="only say what would be sent")] = False,
    legacy: UnneededFlag = False,
    reassemble: UnneededFlag = False,
    verbose: UnneededFlag = False,
    link: Link = Link(),  # noqa: B008
) -> None:
    """Send a stopped virtual machine to a registry.

    Example: lume push web web:1.0 --organization me --additional-tags latest
    """
    if legacy or reassemble:
        raise NotPossibleHere("lumed pushes Lume's present format, and container disks")
    repository, tag = _split_tag(image)
    tags = [tag, *(additional_tags or ())]
    with link.connect() as client:
        if dry_run:
            vm, config = client.get_vm(name, storage), client.get_config()
            place = registry or config.registry, organization or config.organization
            for tag in tags:
                show("/".join((*filter(None, place), f"{repository}:{tag}")))
            say(f"would send {describe_size(vm.disk_allocated_bytes)} at most, uncompressed")
            return
        operation = client.push_vm(
            name,
            repository,
            tags,
            registry=registry,
            organization=organization,
            storage=storage,
            chunk_size_mb=chunk_size_mb,
            single_layer=single_layer,
            format=image_format,
            username=username,
            password=_get_password(password, password_stdin),
        )
        done = follow(client, operation)
    say(f"{name} is pushed as {image}")
    if done.result is not None:
        show(done.result)


def convert(
    source: ImageName,
    target: str,
    /,
    *,
    additional_tags: Tags = None,
    registry: Registry = None,
    organization: Organization = None,
    single_layer: Annotated[bool, Parameter(negative="")] = False,
    image_format: ImageFormat = "lume",
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    verbose: UnneededFlag = False,
    link: Link = Link(),  # noqa: B008
) -> None:
    """Send an image to a registry in another format, by way of a virtual machine for a while.

    Example: lume convert old:latest new:latest --organization me
    """
    repository, tag = _split_tag(target)
    if dry_run:
        say(f"would pull {source} and push it as {target}")
        return
    between = f"convert-{os.urandom(4).hex()}"
    with link.connect() as client:
        pulled = client.pull_vm(source, between, registry=registry, organization=organization)
        try:
            if pulled.operation is not None:
                follow(client, pulled.operation)
            operation = client.push_vm(
                between,
                repository,
                [tag, *(additional_tags or ())],
                registry=registry,
                organization=organization,
                single_layer=single_layer,
                format=image_format,
            )
            done = follow(client, operation)
        finally:
            _delete_if_there(client, between, None)
    say(f"{source} is pushed as {target}")
    if done.result is not None:
        show(done.result)


def images(
    *,
    organization: Annotated[str | None, Parameter(help="only those of it")] = None,
    format: AsFormat = "text",
    link: Link = Link(),  # noqa: B008
) -> None:
    """List the images in the cache.

    Example: lume images
    """
    with link.connect() as client:
        found = client.list_images(organization)
    if format != "text":
        show_data([image.raw for image in found], format)
    elif found:
        show_table(_COLUMNS, found)
    else:
        say("No images are cached")


def delete_image(image: ImageName, /, *, link: Link = Link()) -> None:  # noqa: B008
    """Forget an image's name, and the image with its last name.

    Example: lume image delete debian:12
    """
    with link.connect() as client:
        client.delete_image(image)
    say(f"{image} is deleted")


def prune(
    *,
    dry_run: Annotated[bool, Parameter(negative="", help="only say what would go")] = False,
    format: AsFormat = "text",
    link: Link = Link(),  # noqa: B008
) -> None:
    """Remove the cached images that no virtual machine rests on.

    Example: lume prune --dry-run
    """
    with link.connect() as client:
        pruned = client.prune_images(dry_run=dry_run)
    if format != "text":
        show_data(pruned.raw, format)
        return
    for image in pruned.removed:
        show(image.name)
    would = "would be freed" if dry_run else "freed"
    say(f"{describe_size(pruned.freed_bytes)} {would}; {len(pruned.kept)} images are in use")


def build(
    image: str,
    /,
    *,
    packages: Annotated[
        list[str] | None,
        Parameter(help="more Debian packages", consume_multiple=True, negative_iterable=""),
    ] = None,
    run: Annotated[
        list[str] | None,
        Parameter(help="a shell command in the guest's file system; repeatable"),
    ] = None,
    link: Link = Link(),  # noqa: B008
) -> None:
    """Build a Debian guest from Debian's packages; it is in the cache under its name then.

    Example: lume image build debian:12 --packages git nginx --run "systemctl enable nginx"
    """
    with link.connect() as client:
        operation = client.build_image(image, packages=packages or (), run=run or ())
        follow(client, operation.id)
    say(f"{image} is built; use it: lume create NAME --image {image}")


def _split_tag(image: str) -> tuple[str, str]:
    name, colon, tag = image.rpartition(":")
    if not colon or "/" in tag:
        raise LumedError(f"{image} has no tag", hint=f"name it with one: {image}:latest")
    return name, tag


def _get_password(given: str | None, from_stdin: bool) -> str | None:
    if not from_stdin:
        return given
    return sys.stdin.readline().rstrip("\r\n")


def _delete_if_there(client: Client, name: str, storage: str | None) -> None:
    try:
        client.delete_vm(name, storage)
    except (NotFound, PullFailed):
        return


_COLUMNS: tuple[Column[Image], ...] = (
    Column("NAME", lambda image: image.name),
    Column(
        "IMAGE ID",
        lambda image: (image.digest or image.id).removeprefix("sha256:")[:12],
        1,
    ),
    Column("SIZE", lambda image: describe_size(image.size_bytes), 2),
    Column("DISK", lambda image: describe_size(image.virtual_size_bytes), 4),
    Column("PLATFORM", lambda image: f"{image.os}/{image.architecture}", 5),
    Column("LAST USED", lambda image: image.last_used_at[:19].replace("T", " "), 3),
    Column("USED BY", lambda image: ", ".join(image.vms), 6),
)

image_app = App(name="image", help="Build, list and delete images of the cache.")
image_app.command(build)
image_app.command(images, name="ls")
image_app.command(delete_image, name="delete")
