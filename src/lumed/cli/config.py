"""`lume config`: the server's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from lumed.cli.link import Link
from lumed.cli.output import Column, say, show, show_data, show_table
from lumed.cli.vms import AsFormat
from lumed.client.models import Location
from lumed.errors import NotPossibleHere
from lumed.units import describe_size


def get(*, format: AsFormat = "text", link: Link = Link()) -> None:  # noqa: B008
    """Show all settings.

    Example: lume config get --format json
    """
    with link.connect() as client:
        config = client.get_config()
    if format != "text":
        show_data(config.raw, format)
        return
    show(f"default storage: {config.default_location}")
    for location in config.locations:
        show(f"storage {location.name}: {location.path}")
    show(f"cache: {config.cache_directory or '-'}")
    show(f"default image: {config.default_image}")
    show(f"registry: {config.registry}")
    show(f"organization: {config.organization or '-'}")


def add(name: str, path: Path, /, *, link: Link = Link()) -> None:  # noqa: B008
    """Add a storage location.

    Example: lume config storage add fast /mnt/nvme/lume
    """
    with link.connect() as client:
        client.add_location(name, str(path.expanduser().absolute()))
    say(f"{name} is added")


def remove(name: str, /, *, link: Link = Link()) -> None:  # noqa: B008
    """Forget a storage location; what is in it stays.

    Example: lume config storage remove fast
    """
    with link.connect() as client:
        client.remove_location(name)
    say(f"{name} is removed; its files are where they were")


def list_(*, format: AsFormat = "text", link: Link = Link()) -> None:  # noqa: B008
    """List the storage locations.

    Example: lume config storage list
    """
    with link.connect() as client:
        config = client.get_config()
    if format != "text":
        show_data(config.raw["vmLocations"], format)
        return
    columns: tuple[Column[Location], ...] = (
        Column("NAME", lambda location: location.name),
        Column("PATH", lambda location: location.path),
        Column(
            "DEFAULT",
            lambda location: "yes" if location.name == config.default_location else "",
            1,
        ),
    )
    show_table(columns, config.locations)


def default(name: str, /, *, link: Link = Link()) -> None:  # noqa: B008
    """Choose where virtual machines go that name no storage.

    Example: lume config storage default fast
    """
    with link.connect() as client:
        client.set_default_location(name)
    say(f"{name} is the default storage")


def cache_status(*, link: Link = Link()) -> None:  # noqa: B008
    """Show where the cache is and what it holds.

    Example: lume config cache status
    """
    with link.connect() as client:
        config, images = client.get_config(), client.list_images()
    show(f"directory: {config.cache_directory or '-'}")
    show(f"enabled: {'yes' if config.caching_enabled else 'no'}")
    show(f"images: {len(images)}, {describe_size(sum(image.size_bytes for image in images))}")


def cache_dir(path: Path | None = None, /, *, link: Link = Link()) -> None:  # noqa: B008
    """Show the cache's directory, or choose another; images stay where they are.

    Example: lume config cache dir /mnt/big/lume-cache
    """
    with link.connect() as client:
        if path is None:
            show(client.get_config().cache_directory or "-")
            return
        client.change_config(cache_directory=str(path.expanduser().absolute()))
    say(f"the cache is {path}")


def enable(*, link: Link = Link()) -> None:  # noqa: B008
    """Keep images in the cache.

    Example: lume config cache enable
    """
    with link.connect() as client:
        client.change_config(caching_enabled=True)
    say("images are kept")


def disable() -> None:
    """Not possible: disks rest on the images in the cache.

    Example: lume prune
    """
    raise NotPossibleHere(
        "Images are always kept, since disks of virtual machines rest on them",
        hint="remove those that nobody needs: lume prune",
    )


def registry_status(*, link: Link = Link()) -> None:  # noqa: B008
    """Show the registry and the organization for names without them.

    Example: lume config registry status
    """
    with link.connect() as client:
        config = client.get_config()
    show(f"registry: {config.registry}")
    show(f"organization: {config.organization or '-'}")


def registry_type(
    kind: Literal["ghcr", "gcs"] | None = None,
    /,
    *,
    link: Link = Link(),  # noqa: B008
) -> None:
    """Show the kind of registry: ghcr, which stands for every OCI registry.

    Example: lume config registry type
    """
    if kind == "gcs":
        gcs()
    show("ghcr")


def ghcr(
    *,
    registry: Annotated[str | None, Parameter(help="such as ghcr.io")] = None,
    organization: Annotated[str | None, Parameter(help="such as trycua")] = None,
    link: Link = Link(),  # noqa: B008
) -> None:
    """Choose the registry and the organization for names without them.

    Example: lume config registry ghcr --registry registry.local:5000 --organization team
    """
    with link.connect() as client:
        client.change_config(registry=registry, organization=organization)
    registry_status(link=link)


def gcs(*, api_url: str | None = None, api_key: str | None = None) -> None:
    """Not possible: a private service of Lume's maker.

    Example: lume config registry gcs
    """
    raise NotPossibleHere(
        "gcs is a private service of Lume's maker", hint="every OCI registry works: ghcr"
    )


def interfaces(*, link: Link = Link()) -> None:  # noqa: B008
    """List the host's interfaces that a virtual machine can be bridged to.

    Example: lume config network interfaces
    """
    with link.connect() as client:
        for name in client.host_status().network_interfaces:
            show(name)


def telemetry_status() -> None:
    """Say that nothing is sent to anybody.

    Example: lume config telemetry status
    """
    show("disabled: lumed has no telemetry")


def _build() -> App:
    config = App(name="config", help="Show and change the settings.")
    config.default(get)
    config.command(get)
    storage = App(name="storage", help="Storage locations.")
    storage.command(add)
    storage.command(remove)
    storage.command(list_, name="list")
    storage.command(default)
    cache = App(name="cache", help="The image cache.")
    cache.default(cache_status)
    cache.command(cache_status, name="status")
    cache.command(cache_dir, name="dir")
    cache.command(enable)
    cache.command(disable)
    registry = App(name="registry", help="The registry for names without one.")
    registry.default(registry_status)
    registry.command(registry_status, name="status")
    registry.command(registry_type, name="type")
    registry.command(ghcr)
    registry.command(gcs)
    network = App(name="network", help="The host's network.")
    network.command(interfaces)
    telemetry = App(name="telemetry", help="There is none.")
    telemetry.default(telemetry_status)
    telemetry.command(telemetry_status, name="status")
    telemetry.command(telemetry_status, name="disable")
    for group in (storage, cache, registry, network, telemetry):
        config.command(group)
    return config


config_app = _build()
