"""Names that a shell can complete: asked of a server that runs, and of no other.

`lume __complete` (cyclopts) calls these when a shell asks, see shells/. Whatever goes wrong, the
shell is told nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, TypeVar

from cyclopts import Parameter

from lumed.cli.link import answers
from lumed.client.discover import find_home, find_socket
from lumed.errors import LumedError

if TYPE_CHECKING:
    from cyclopts.completion import CompletionContext

    from lumed.client.calls import Call

T = TypeVar("T")
_PATIENCE_S = 1.0


def complete_vms(context: CompletionContext) -> list[tuple[str, str]]:
    """The VMs, with their states."""
    from lumed.client.calls import list_vms

    return _printable((vm.name, vm.state) for vm in _ask(context, list_vms()))


def complete_images(context: CompletionContext) -> list[tuple[str, str]]:
    """The names of the images in the cache."""
    from lumed.client.calls import list_images

    images = _ask(context, list_images())
    return _printable((name, image.os) for image in images for name in image.names)


def complete_vms_and_images(context: CompletionContext) -> list[tuple[str, str]]:
    """Both."""
    return complete_vms(context) + complete_images(context)


def complete_logs(context: CompletionContext) -> list[tuple[str, str]]:
    """What `lume logs` shows."""
    return [*complete_vms(context), ("info", "the server's"), ("error", "the server's")]


def complete_guest_paths(context: CompletionContext) -> list[tuple[str, str]]:
    """The beginnings of paths in VMs that run."""
    return [(f"{name}:", state) for name, state in complete_vms(context) if state == "running"]


VmName = Annotated[str, Parameter(completer=complete_vms)]
ImageName = Annotated[str, Parameter(completer=complete_images)]


def _ask(context: CompletionContext, call: Call[list[T]]) -> list[T]:
    from lumed.client.client import Client

    given = context.get("--home")
    home, _ = find_home(given.raw if given is not None else None)
    if not answers(find_socket(home)):
        return []
    try:
        with Client(home=home.root) as client:
            return client.carry_out(replace(call, timeout_s=_PATIENCE_S))
    except LumedError:
        return []


def _printable(names: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Without names that a line could not hold, such as a path with a line feed."""
    return [(name, what) for name, what in names if name.isprintable()]
