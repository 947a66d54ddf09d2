"""The `lume` command: names, options and help. What a command does is given by `main.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter, validators

from lumed import __version__
from lumed.cli.apple import add_apple_commands
from lumed.cli.config import add_config_commands
from lumed.cli.images import add_image_commands
from lumed.cli.link import DEFAULT_PORT
from lumed.cli.look import add_look_commands
from lumed.cli.run import add_run_command
from lumed.cli.vms import add_vm_commands


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

    add_vm_commands(app)
    add_run_command(app)
    add_look_commands(app)
    add_image_commands(app)
    add_config_commands(app)
    add_apple_commands(app)
    return app
