"""The `lume` command: names, options and help. What a command does is given by `main.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter, validators

from lumed import __version__
from lumed.cli.link import DEFAULT_PORT

_LAZY = {
    "vms": ("create", "ls", "get", "set", "clone", "stop", "shutdown", "restart", "delete"),
    "run": ("run",),
    "look": ("attach", "screenshot", "logs"),
    "images": ("pull", "push", "convert", "images", "prune", "image"),
    "config": ("config",),
    "apple": ("setup", "ipsw", "sip"),
}
_FUNCTIONS = {"set": "set_", "image": "image_app", "config": "config_app"}


@dataclass(frozen=True, slots=True)
class Commands:
    """The commands' work; each returns the exit status."""

    serve: Callable[[str, int, Path | None, Path | None], int]
    doctor: Callable[[Path | None], int]


def build_cli(commands: Commands) -> App:
    """The command line over some work."""
    app = App(
        name="lume",
        help="Local virtual machines for programs: the Lume API on Linux.",
        version=__version__,
        result_action="return_value",
    )

    @app.command
    def serve(
        *,
        port: Annotated[
            int,
            Parameter(
                help="TCP port; 0 picks a free one", validator=validators.Number(gte=0, lte=65535)
            ),
        ] = DEFAULT_PORT,
        host: Annotated[str, Parameter(help="address to listen on")] = "127.0.0.1",
        socket: Annotated[Path | None, Parameter(help="unix socket, beside the port")] = None,
        home: Annotated[Path | None, Parameter(help="home directory (or LUME_HOME)")] = None,
    ) -> int:
        """Serve the API until Ctrl-C; machines keep running when it ends.

        Example: lume serve --port 7777
        """
        return commands.serve(host, port, socket, home)

    @app.command
    def doctor(
        *,
        home: Annotated[Path | None, Parameter(help="home directory (or LUME_HOME)")] = None,
    ) -> int:
        """Say what this host has and lacks for virtual machines, with the lines that mend it.

        Example: lume doctor
        """
        return commands.doctor(home)

    for place, names in _LAZY.items():
        for name in names:
            # Imported when it is called: `lume ls` has no use for the rest.
            app.command(f"lumed.cli.{place}:{_FUNCTIONS.get(name, name)}", name=name)
    return app
